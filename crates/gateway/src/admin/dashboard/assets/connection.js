// Requests to the admin API, and the stream of events. The key is kept in memory only.

const SILENCE_MS = 6000;
const MAX_RETRY_MS = 5000;

let key = null;

export function setKey(value) {
  key = value;
}

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Sends a request to the admin API. Fails with an `ApiError` that has the router's message.
async function send(path, options = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const response = await fetch(`admin/${path}`, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let message = `the router responded with ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* Not the router's own error. */ }
  throw new ApiError(response.status, message);
}

export const get = async (path) => (await send(path)).json();

export const post = async (path) => (await send(path, { method: "POST" })).json();

// Reads a stream of server-sent events, and calls `onEvent` with the name and the data of each.
async function readEvents(body, onEvent, onData) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    onData();
    buffered += value;
    let end;
    while ((end = buffered.indexOf("\n\n")) >= 0) {
      let name = "message";
      let data = "";
      for (const line of buffered.slice(0, end).split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data += line.slice(6);
      }
      buffered = buffered.slice(end + 2);
      if (data) onEvent(name, JSON.parse(data));
    }
  }
}

// Follows the stream for ever, and opens it again when it ends. `handlers` has `event`, `lost` and
// `refused`; after `refused`, the stream waits until the returned function is called.
export function follow(handlers) {
  let retry = 0;
  let wake = () => {};
  const pause = (milliseconds) => new Promise((resolve) => {
    wake = resolve;
    if (milliseconds !== null) setTimeout(resolve, milliseconds);
  });

  async function once() {
    const abort = new AbortController();
    let timer = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const response = await send("stream", { signal: abort.signal });
      await readEvents(response.body, (name, data) => {
        retry = 0;
        handlers.event(name, data);
      }, () => {
        clearTimeout(timer);
        timer = setTimeout(() => abort.abort(), SILENCE_MS);
      });
      return 0;
    } catch (error) {
      if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
        handlers.refused(error);
        return null;
      }
      handlers.lost(error);
      retry = Math.min(MAX_RETRY_MS, retry * 2 || 500);
      return retry;
    } finally {
      clearTimeout(timer);
    }
  }

  (async () => {
    for (;;) await pause(await once());
  })();
  return () => wake();
}
