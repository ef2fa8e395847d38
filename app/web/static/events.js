// Server-sent events by fetch. EventSource hides the comments that say "still there", so it can't notice a network that
// fell silent, and after some errors it gives up for good.

const SILENCE = 25_000; // the server says something every 15 s
const LONGEST_WAIT = 10_000;

// Calls `event(name, data)` and `state("live" | "lost" | "none")`, until `stop()` is called or the server says that there
// is no more to come.
export function listen(path, { event, state }) {
  let abort = null;
  let timer = null;
  let lastId = "";
  let failures = 0;
  let over = false;

  function quiet() {
    clearTimeout(timer);
    timer = setTimeout(() => abort?.abort(), SILENCE);
  }

  function take(block) {
    state(block === ": stale" ? "lost" : "live"); // the server is there, but is its database?
    let name = "message";
    const data = [];
    for (const line of block.split("\n")) {
      const [, field, value] = line.match(/^(\w+): ?(.*)$/) ?? [];
      if (field === "event") name = value;
      else if (field === "id") lastId = value;
      else if (field === "data") data.push(value);
    }
    if (data.length) event(name, JSON.parse(data.join("\n")));
  }

  async function connect() {
    clearTimeout(timer);
    if (over || document.hidden || abort) return;
    const mine = (abort = new AbortController());
    let ended = false;
    let wait = 0;
    quiet();
    try {
      const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
      const answer = await fetch(path, { headers, signal: mine.signal, cache: "no-store" });
      if (answer.status === 401) return location.reload(); // to the login
      if (answer.status === 204 || answer.status === 404) return stop();
      wait = 1000 * Number(answer.headers.get("Retry-After") ?? 0);
      if (!answer.ok) throw new Error(answer.status);
      failures = 0;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        quiet();
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        blocks.forEach(take);
      }
      ended = true; // a deploy, or the last event: asked again at once, and 204 says that there is no more
    } catch {
      // Told below.
    } finally {
      clearTimeout(timer);
      if (abort === mine) abort = null;
    }
    if (over || document.hidden) return;
    if (!ended || failures) state("lost");
    failures += 1;
    timer = setTimeout(connect, Math.max(wait, Math.min(LONGEST_WAIT, 500 * 2 ** (failures - 1)) * (0.5 + Math.random() / 2)));
  }

  // Browsers have six connections a host for all tabs together: one that nobody looks at gives its own back.
  function shown() {
    if (document.hidden) abort?.abort();
    else connect();
  }

  function stop() {
    over = true;
    clearTimeout(timer);
    abort?.abort();
    document.removeEventListener("visibilitychange", shown);
    removeEventListener("online", connect);
    state("none");
  }

  document.addEventListener("visibilitychange", shown);
  addEventListener("online", connect);
  connect();
  return { stop };
}
