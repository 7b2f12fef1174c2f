// Asking the server. The key lives in this module and nowhere else: no storage, no address, no copied text.

let key = null;

export function useKey(value) {
  key = value;
}

export function hasKey() {
  return key !== null;
}

// What the server refused: its own message, and the field that it names.
export class Refusal extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

function headers() {
  return key === null ? {} : { authorization: `Bearer ${key}` };
}

async function refusalOf(response) {
  const body = await response.json().catch(() => null);
  const message = `the server answered ${response.status}`;
  return new Refusal(response.status, body?.error ?? { message });
}

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { message: "the server cannot be reached; is it still running?" });
  }
}

export async function getJson(path) {
  const response = await reach(path, { headers: headers() });
  if (!response.ok) throw await refusalOf(response);
  return response.json();
}

// Events of a generation as they come. Throws Refusal, also for an error event after the stream has begun.
export async function* generationEvents(body, signal) {
  const response = await reach("v1/images/generations", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await refusalOf(response);
  for await (const event of serverSent(response.body)) {
    if (event.type === "error") throw new Refusal(200, event.error);
    yield event;
  }
}

async function* serverSent(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
    }
  }
}
