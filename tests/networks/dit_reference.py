"""The networks of the MFM paper written once more, from the equations alone: float64, functional, nothing shared.

Weights are a dictionary of tensors by the official names; a "dit" of any size is what these names and shapes say.
`mfm` is the meta flow map, `dmf` the flow map it descends from (encoder told the first time, decoder the second), and
`sit` a plain velocity (one time).
"""

import math

import torch


def random_weights(
    *, width, depth, patch=2, channels=4, grid=4, classes=5, guidance=2, kind="mfm", sigma=False, seed=0
):
    """Weights with every number random, by the names and shapes of the official files."""
    generator = torch.Generator().manual_seed(seed)
    outputs = patch * patch * channels * (2 if sigma else 1)

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def embedder(name):
        return linear(f"{name}.mlp.0", width, 256) | linear(f"{name}.mlp.2", width, width)

    shapes = {"pos_embed": (1, grid * grid, width), "y_embedder.embedding_table.weight": (classes + 1, width)}
    shapes |= {"x_embedder.proj.weight": (width, channels, patch, patch), "x_embedder.proj.bias": (width,)}
    shapes |= embedder("t_embedder") | linear("final_layer.linear", outputs, width)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    for index in range(depth):
        block = f"blocks.{index}"
        shapes |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
        shapes |= linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    if kind == "mfm":
        shapes |= {
            "x_cond_embedder.proj.weight": (width, channels, patch, patch),
            "x_cond_embedder.proj.bias": (width,),
        }
        for name in ("s_embedder", "t_cond_embedder", "s_embedder_second", "t_embedder_second"):
            shapes |= embedder(name)
        shapes |= linear("x_cond_adaLN.1", 2 * width, width)
        shapes |= {"guidance_embedder.embedding_table.weight": (guidance, width)}
    return {
        name: 0.3 * torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()
    }


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def time_embedding(weights, name, time):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=time.dtype) / 128)
    angle = time[:, None] * frequencies
    features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
    return linear(weights, f"{name}.mlp.2", silu(linear(weights, f"{name}.mlp.0", features)))


def patches(weights, name, x):
    """A patch is a row of the flattened convolution kernel: channel, then row, then column."""
    kernel, size = weights[f"{name}.proj.weight"], weights[f"{name}.proj.weight"].shape[-1]
    count, channels, height, width = x.shape
    cells = x.reshape(count, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5)
    tokens = cells.reshape(count, (height // size) * (width // size), channels * size * size)
    return tokens @ kernel.flatten(1).T + weights[f"{name}.proj.bias"]


def normalised(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def modulated(x, shift, scale):
    return normalised(x) * (1 + scale[:, None]) + shift[:, None]


def attention(weights, name, x, heads):
    count, tokens, width = x.shape
    qkv = linear(weights, f"{name}.qkv", x).reshape(count, tokens, 3, heads, width // heads)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // heads)
    weighted = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), value)
    return linear(weights, f"{name}.proj", weighted.reshape(count, tokens, width))


def block(weights, index, h, c, heads):
    name = f"blocks.{index}"
    shift, scale, gate, shift_m, scale_m, gate_m = linear(weights, f"{name}.adaLN_modulation.1", silu(c)).chunk(6, 1)
    h = h + gate[:, None] * attention(weights, f"{name}.attn", modulated(h, shift, scale), heads)
    hidden = gelu(linear(weights, f"{name}.mlp.fc1", modulated(h, shift_m, scale_m)))
    return h + gate_m[:, None] * linear(weights, f"{name}.mlp.fc2", hidden)


def blocks(weights, h, encoder, decoder, heads, encoder_depth):
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for index in range(depth):
        h = block(weights, index, h, encoder if index < encoder_depth else decoder, heads)
    return h


def output(weights, h, c, x, *, sigma=False):
    """Pixels of each patch in raster order, the channel fastest; of a learned sigma the first half of the channels."""
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", silu(c)).chunk(2, 1)
    tokens = linear(weights, "final_layer.linear", modulated(h, shift, scale))
    channels, height, width = x.shape[1:]
    size = weights["x_embedder.proj.weight"].shape[-1]
    kept = torch.empty_like(x)
    per_pixel = channels * (2 if sigma else 1)
    for row in range(height):
        for column in range(width):
            token = (row // size) * (width // size) + column // size
            first = ((row % size) * size + column % size) * per_pixel
            kept[:, :, row, column] = tokens[:, token, first : first + channels]
    return kept


def mfm(weights, x_s, s, u, t, x_t, label, row, *, heads, encoder_depth, time_flip):
    """v_{s,u}(x_s; t, x_t) of method note 5.1; row: of the guidance table."""
    s, u = (1 - s, 1 - u) if time_flip else (s, u)
    outer = time_embedding(weights, "t_cond_embedder", t)
    shift, scale = linear(weights, "x_cond_adaLN.1", silu(outer)).chunk(2, 1)
    seen = patches(weights, "x_cond_embedder", x_t) * (1 + scale[:, None]) + shift[:, None]
    h = patches(weights, "x_embedder", x_s) + seen + weights["pos_embed"]
    told = outer + weights["y_embedder.embedding_table.weight"][label]
    encoder = time_embedding(weights, "s_embedder", s) + time_embedding(weights, "t_embedder", u) + told
    encoder = encoder + weights["guidance_embedder.embedding_table.weight"][row]
    decoder = time_embedding(weights, "s_embedder_second", s) + time_embedding(weights, "t_embedder_second", u) + told
    velocity = output(weights, blocks(weights, h, encoder, decoder, heads, encoder_depth), decoder, x_s)
    return -velocity if time_flip else velocity


def dmf(weights, x, first, second, label, *, heads, encoder_depth):
    """DMF's average velocity between two times, noise at 1."""
    label = weights["y_embedder.embedding_table.weight"][label]
    encoder = time_embedding(weights, "t_embedder", first) + label
    decoder = time_embedding(weights, "t_embedder", second) + label
    h = patches(weights, "x_embedder", x) + weights["pos_embed"]
    return output(weights, blocks(weights, h, encoder, decoder, heads, encoder_depth), decoder, x)


def sit(weights, x, time, label, *, heads, sigma):
    """SiT's velocity, noise at 0."""
    c = time_embedding(weights, "t_embedder", time) + weights["y_embedder.embedding_table.weight"][label]
    h = patches(weights, "x_embedder", x) + weights["pos_embed"]
    return output(weights, blocks(weights, h, c, c, heads, 0), c, x, sigma=sigma)


def doubled(weights):
    return {name: tensor.double() for name, tensor in weights.items()}
