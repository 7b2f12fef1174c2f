// The same request for a terminal and for a notebook. A key is never in it: it is read from the environment.

const VARIABLE = "MFM_RAY_API_KEY";

export function curl(body, base, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $${VARIABLE}"` : "";
  const text = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  return `curl -s ${base}v1/images/generations \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${text}'\n`;
}

export function python(body, base, withKey) {
  const { model, prompt = "", n = 1, ...ours } = body;
  const key = withKey ? `os.environ["${VARIABLE}"]` : '"none"';
  return [
    "import base64",
    ...(withKey ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${base}v1`)}, api_key=${key})`,
    "answer = client.images.generate(",
    `    model=${literal(model)},`,
    `    prompt=${literal(prompt)},`,
    `    n=${n},`,
    `    extra_body=${literal(ours, "    ")},`,
    ")",
    "for index, image in enumerate(answer.data):",
    '    Path(f"image_{index}.png").write_bytes(base64.b64decode(image.b64_json))',
    "    print(index, image.reward, image.nfe)",
    "",
  ].join("\n");
}

// A value as Python writes it.
function literal(value, indent = "") {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}    `;
  if (Array.isArray(value)) {
    if (value.every((item) => typeof item === "number")) return `[${value.join(", ")}]`;
    return `[\n${value.map((item) => `${deeper}${literal(item, deeper)},\n`).join("")}${indent}]`;
  }
  const entries = Object.entries(value).map(([key, item]) => `${deeper}${JSON.stringify(key)}: ${literal(item, deeper)},\n`);
  return `{\n${entries.join("")}${indent}}`;
}
