// What the page asks of the server. Addresses are relative: they hold behind a path prefix.

const STORED = "interflow-key";

/** An error of the server, or none reached: `title` and `detail` for people, `status` 0 where there was no answer. */
export class Problem extends Error {
  constructor({ title, detail, status = 0, code = "", request_id = "" }) {
    super(detail);
    Object.assign(this, { title, detail, status, code, requestId: request_id });
  }
}

// What a key can be, as app/security.py has it: with what no header bears, fetch would fail before it asks anything.
const KEY = /^[!-~]+$/;

/** The key of this tab; another tab, or the next visit, does not have it. `set` tells whether it is one. */
export const key = {
  get: () => {
    const value = sessionStorage.getItem(STORED);
    return KEY.test(value ?? "") ? value : null;
  },
  set: (value) => {
    const fits = KEY.test(value);
    if (fits) sessionStorage.setItem(STORED, value);
    return fits;
  },
  clear: () => sessionStorage.removeItem(STORED),
};

/**
 * Ask the server for JSON.
 *
 * @param path relative to the page
 * @param query parameters; those undefined are left out
 * @param options of fetch
 * @throws Problem, or the AbortError of `options.signal`
 */
export async function ask(path, query = {}, options = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined);
  const address = given.length ? `${path}?${new URLSearchParams(given)}` : path;
  const headers = { ...options.headers, ...(key.get() ? { "X-API-Key": key.get() } : {}) };
  let answer;
  try {
    answer = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "No answer", detail: "The server could not be reached. Is it still running?" });
  }
  const body = await answer.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    return null;
  });
  if (answer.ok && body) return body;
  throw new Problem(
    body?.detail
      ? body
      : {
          title: "Not an answer",
          detail: `The server answered ${answer.status} without saying why.`,
          status: answer.status,
        },
  );
}

/** Ask for what an image shows, with the maps of its evidence; `model` is {model: its name, version}. */
export function predict(image, model, signal) {
  const type = image.type.startsWith("image/") ? image.type : "application/octet-stream";
  return ask(
    "predict",
    { ...model, top_k: 5, explain: "maps" },
    {
      method: "POST",
      body: image,
      headers: { "Content-Type": type },
      signal,
    },
  );
}

/** The same as a line for a terminal; a key is not shown. */
export function curlLine(fileName, model) {
  const name = /^[\w.-]+$/.test(fileName) ? fileName : "image.jpg"; // others would need quoting, for curl and the shell
  const address = new URL("predict", document.baseURI);
  address.search = new URLSearchParams({ ...model, top_k: 5 });
  return `curl ${key.get() ? '-H "X-API-Key: $KEY" ' : ""}-F image=@${name} "${address}"`;
}
