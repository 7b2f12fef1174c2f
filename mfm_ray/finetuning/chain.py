"""Anchors that follow the tilted law: chains that move by the very draws that targets are made of.

A chain's state is a clean sample x_1. Noised to x_t it is offered the frozen map's draws from p(x_1 | x_t), and one of
all of them, itself included, is kept with probability ~ exp r: iterated sampling-importance resampling, which leaves
the tilted posterior p(x_1 | x_t) exp(r) / Z invariant for any number of draws, and so the tilted law. States made
around such anchors are those that the tuned sampler will meet; weights there are near one, where those of data may all
be tiny. With probability `restart` a row begins again at its datum, which keeps full support and finds new modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_ray.errors import require
from mfm_ray.finetuning.targets import Anchors, DriftTargets
from mfm_ray.finetuning.tilt import Tilt
from mfm_ray.noise import Noise, Stream


class TiltedChains:
    """`chains` anchors for each row of a batch, used in turn: row b of step k moves chain k mod chains of row b.

    rows: of this worker's batch. restart: share of the visits that begin again at a datum. A function of the data and
    of keyed noise alone, so that any split over workers makes the same chains; `state` and `load_state` resume them.
    """

    def __init__(self, *, rows: int, event_shape: tuple[int, ...], chains: int = 8, restart: float = 0.2) -> None:
        require(chains >= 1, "chains", chains, "an integer of at least 1")
        require(0 <= restart <= 1, "restart", restart, "a number in [0, 1]")
        self.chains, self.restart = chains, restart
        self._x1 = torch.zeros(chains, rows, *event_shape)
        self._label = torch.full((chains, rows), -1)
        self._reward = torch.full((chains, rows), torch.nan, dtype=torch.float64)
        self._begun = torch.zeros(chains, rows, dtype=torch.bool)

    def anchors(self, tilt: Tilt, data: Tensor, label: Tensor | None, noise: Noise, step: int) -> Anchors:
        """Anchors of a step, (B, ...), from this step's data and labels for chains that begin, which are scored."""
        chain = step % self.chains
        uniform = noise.fold_in(Stream.CHAIN).uniform().to(self._begun.device)
        begins = (uniform < self.restart) | ~self._begun[chain]
        rows = begins.nonzero().flatten()
        if len(rows):
            # all are scored, at the price of a few, so that a reward sees one shape of batch at every step
            self._x1[chain, rows] = data[rows].to(self._x1)
            self._reward[chain, rows] = tilt.rewards(data)[rows].to(self._reward)
            if label is not None:
                self._label[chain, rows] = label[rows].to(self._label)
            self._begun[chain, rows] = True
        # copies: the chain may move on while what was made around these anchors is still in use
        kept = None if label is None else self._label[chain].clone().to(label)
        return Anchors(self._x1[chain].clone().to(data), kept, self._reward[chain].clone().to(data.device))

    def advance(self, targets: DriftTargets, step: int, *, rows: slice = slice(None)) -> None:
        """Move the chains of a step to where the targets of these rows say."""
        assert targets.next_x1 is not None
        assert targets.next_reward is not None
        chain = step % self.chains
        self._x1[chain, rows] = targets.next_x1.to(self._x1)
        self._reward[chain, rows] = targets.next_reward.to(self._reward)

    def visited(self, step: int) -> dict[str, Tensor]:
        """What the chains of a step are now, copied: all that the step can have changed."""
        chain = step % self.chains
        return {name: value[chain].clone() for name, value in self._parts().items()}

    def put(self, step: int, visited: dict[str, Tensor]) -> None:
        """Bring the chains of a step to what `visited` of other chains says."""
        chain = step % self.chains
        for name, value in self._parts().items():
            value[chain] = visited[name]

    def state(self) -> dict[str, Tensor]:
        """All that the chains are, copied."""
        return {name: value.clone() for name, value in self._parts().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """ValueError for chains of another number or shape."""
        if state["x1"].shape != self._x1.shape:
            raise ValueError(f"chains of shape {tuple(state['x1'].shape)}, expected {tuple(self._x1.shape)}")
        for name, value in self._parts().items():
            value.copy_(state[name])

    def _parts(self) -> dict[str, Tensor]:
        return {"x1": self._x1, "label": self._label, "reward": self._reward, "begun": self._begun}
