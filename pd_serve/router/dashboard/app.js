// Shows what GET /dashboard/events says, once a second. Everything that comes from there is hostile: it becomes text
// nodes and numbers, never markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const KEPT_S = 300;
const SILENT_MS = 6000; // a router that says nothing for so long is lost
const AGAIN_MS = [500, 1000, 2000, 5000];
const byId = (id) => document.getElementById(id);

let points = []; // [time, TTFT p50, p99, ITL p50, p99, requests/s, errors/s, streams]
let live = null; // the connection's AbortController

// --- words -------------------------------------------------------------------------------------------------------

const DASH = "–";

function seconds(value) {
  if (value === null || value === undefined) return DASH;
  if (value < 0.001) return `${(value * 1e6).toFixed(0)}\u00a0µs`;
  if (value < 1) return `${Number((value * 1e3).toPrecision(3))}\u00a0ms`;
  return `${Number(value.toPrecision(3))}\u00a0s`;
}

function age(value) {
  if (value < 60) return `${value.toFixed(1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
  const hours = Math.floor(value / 3600);
  return hours < 48 ? `${hours} h ${Math.floor((value % 3600) / 60)} min` : `${Math.floor(hours / 24)} days`;
}

const number = (value) => value.toLocaleString("en-US");
const rate = (value) => Number(value.toPrecision(value < 1 ? 2 : 3)).toLocaleString("en-US");

function bytes(value) {
  let unit = 0;
  while (value >= 1000 && unit < 5) { value /= 1000; unit += 1; }
  return `${Number(value.toPrecision(3))} ${["B", "kB", "MB", "GB", "TB", "PB"][unit]}`;
}

// --- documents ---------------------------------------------------------------------------------------------------

function make(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  const { data, ...rest } = options;
  Object.assign(made, rest);
  Object.assign(made.dataset, data || {});
  made.append(...children); // strings become text
  return made;
}

function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

const pill = (state) => make("span", { className: "pill", data: { state } }, state);

// columns: [title, class, what of a row]; the first is the row's header. A body is replaced whole, the head is kept.
function table(id, caption, columns, rows) {
  const found = byId(id);
  found.hidden = rows.length === 0;
  byId(`${id}-empty`).hidden = rows.length > 0;
  if (!found.tHead) {
    const head = columns.map(([title, kind]) => make("th", { scope: "col", className: kind }, title));
    found.append(make("caption", {}, caption), make("thead", {}, make("tr", {}, ...head)), make("tbody"));
  }
  found.tBodies[0].replaceChildren(...rows.map((row) => make("tr", {}, ...columns.map(([, kind, of], place) => {
    const inside = [of(row)].flat();
    const title = kind === "id" ? String(inside[0]) : "";
    return place ? make("td", { className: kind, title }, ...inside)
      : make("th", { scope: "row", className: kind, title }, ...inside);
  }))));
}

function kv(node) {
  if (!node.kv) return DASH;
  const { used, cached, total } = node.kv;
  const parts = [used, cached].map((count) => {
    const part = make("i");
    part.style.width = `${(100 * count) / total}%`;
    return part;
  });
  const share = `${((100 * used) / total).toFixed(0)}%`;
  const title = `${number(used)} used and ${number(cached)} cached of ${number(total)} blocks`;
  return [make("span", { className: "bar", title, ariaHidden: "true" }, ...parts), make("span", { title }, share)];
}

// --- plots -------------------------------------------------------------------------------------------------------

function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

// lines: [name, place in a point]; least: the smallest top of the axis
function plot(id, title, lines, say, least) {
  const figure = byId(id);
  const width = Math.max(figure.clientWidth - 28, 200);
  const height = 150, left = 52, right = 6, top = 8, bottom = 20;
  const now = points.length ? points[points.length - 1][0] : 0;
  const values = points.flatMap((point) => lines.map(([, place]) => point[place])).filter((value) => value !== null);
  const most = ceiling(Math.max(least, ...values));
  const x = (time) => left + (width - left - right) * (1 - (now - time) / KEPT_S);
  const y = (value) => top + (height - top - bottom) * (1 - value / most);
  const newest = points[points.length - 1] || [];
  const spoken = lines.map(([name, place]) => `${name} ${newest[place] === undefined ? DASH : say(newest[place])}`);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} now: ${spoken.join(", ")}` });
  for (const share of [0, 0.5, 1]) {
    drawn.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(most * share), y2: y(most * share) }));
    drawn.append(svg("text", { x: left - 8, y: y(most * share) + 4, "text-anchor": "end" }, share ? say(most * share) : "0"));
  }
  for (const minutes of [5, 4, 3, 2, 1, 0]) {
    const text = minutes ? `−${minutes} min` : "now";
    if (width < 400 && minutes % 2 === 0 && minutes) continue;
    drawn.append(svg("text", { x: x(now - minutes * 60), y: height - 4, "text-anchor": minutes === 5 ? "start" : minutes ? "middle" : "end" }, text));
  }
  lines.forEach(([, place], order) => {
    let path = "", area = "", from = null, last = null;
    const end = () => { if (from !== null) area += `L${last} ${y(0)}L${from} ${y(0)}Z`; from = null; };
    for (const point of points) {
      if (point[place] === null || now - point[0] > KEPT_S) { end(); continue; }
      const here = x(point[0]).toFixed(1);
      const step = `${from === null ? "M" : "L"}${here} ${y(point[place]).toFixed(1)}`;
      if (from === null) from = here;
      last = here;
      path += step;
      area += step;
    }
    end();
    if (!path) return;
    if (!order) drawn.append(svg("path", { class: "area", d: area }));
    drawn.append(svg("path", { class: "ab"[order], d: path }));
  });
  const keys = lines.map((_, order) => make("span", { className: `key ${"ab"[order]}` }, spoken[order]));
  figure.replaceChildren(make("figcaption", {}, make("strong", {}, title), ...keys), drawn);
}

function plots() {
  plot("plot-ttft", "Time to first token", [["p50", 1], ["p99", 2]], seconds, 0.01);
  plot("plot-itl", "Between tokens", [["p50", 3], ["p99", 4]], seconds, 0.001);
  plot("plot-requests", "Requests a second", [["answered", 5], ["errors", 6]], rate, 1);
  plot("plot-streams", "Open streams", [["open", 7]], number, 2);
}

// --- a frame -----------------------------------------------------------------------------------------------------

function tiles(frame) {
  const ready = frame.states.filter((entry) => entry.state === "ready").reduce((sum, entry) => sum + entry.nodes, 0);
  const [ttft, ttft99, itl, itl99, requests, errors] = frame.last_minute;
  const shown = [
    ["Nodes ready", number(ready), `of ${number(frame.nodes_total)}`],
    ["Open streams", number(frame.streams_total), ""],
    ["Waiting for a node", number(frame.waiting), ""],
    ["First token, 1 min", seconds(ttft), `p99 ${seconds(ttft99)}`],
    ["Between tokens, 1 min", seconds(itl), `p99 ${seconds(itl99)}`],
    ["Requests, 1 min", rate(requests), "a second"],
    ["Errors, 1 min", rate(errors), "a second"],
  ];
  byId("tiles").replaceChildren(...shown.map(([name, value, unit]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, `${value} `, make("small", {}, unit)))));
}

function share(lane) {
  if (lane.bytes_per_s === null || !lane.self_test_bytes_per_s) return DASH;
  return `${rate((100 * lane.bytes_per_s) / lane.self_test_bytes_per_s)}%`;
}

const why = (reason) => (reason ? [make("span", { className: "why" }, reason)] : []);

function show(frame) {
  byId("about").textContent = `${frame.version} · up ${age(frame.uptime_s)}${frame.draining ? " · shutting down" : ""}`;
  tiles(frame);
  const nodes = [...frame.nodes, ...frame.unlinked.map((entry) => ({ ...entry, id: entry.url, away: true }))];
  byId("nodes-count").textContent = frame.nodes_total > nodes.length ? `${number(nodes.length)} of ${number(frame.nodes_total)}, the busiest` : "";
  const linked = (of) => (node) => (node.away ? DASH : of(node));
  table("nodes", "Nodes of this router", [
    ["Node", "id", (node) => node.id],
    ["Role", "", linked((node) => node.role)],
    ["Model", "id", linked((node) => node.model)],
    ["State", "", (node) => [pill(node.state), ...why(node.reason)]],
    ["Running", "n", linked((node) => number(node.running))],
    ["Waiting", "n", linked((node) => number(node.waiting))],
    ["Tokens queued", "n", linked((node) => number(node.waiting_tokens))],
    ["Leases", "n", linked((node) => number(node.leases))],
    ["KV used, lighter: cached", "kv", linked(kv)],
  ], nodes);
  table("lanes", "Lanes of decode nodes", [
    ["Decode node", "id", (lane) => lane.decode],
    ["Lane", "", (lane) => lane.lane],
    ["Reads from", "id", (lane) => lane.sources.join(", ") || DASH],
    ["Read", "n", (lane) => bytes(lane.bytes)],
    ["Measured", "n", (lane) => (lane.bytes_per_s === null ? DASH : `${bytes(lane.bytes_per_s)}/s`)],
    ["Self-test", "n", (lane) => (lane.self_test_bytes_per_s === null ? DASH : `${bytes(lane.self_test_bytes_per_s)}/s`)],
    ["Of the self-test", "n", share],
    ["Slow pulls", "n", (lane) => number(lane.slow_pulls)],
  ], frame.lanes);
  byId("unfit").replaceChildren(...frame.unfit.map((pair) =>
    make("li", {}, `${pair.decode} cannot read from ${pair.prefill}: ${pair.reason}`)));
  byId("streams-count").textContent = frame.streams_total > frame.streams.length ? `the oldest ${number(frame.streams.length)} of ${number(frame.streams_total)}` : "";
  table("streams", "Streams being served, the oldest first", [
    ["Request", "id", (stream) => stream.id],
    ["Model", "id", (stream) => stream.model],
    ["Phase", "", (stream) => pill(stream.phase)],
    ["Prefill node", "id", (stream) => stream.prefill || DASH],
    ["Decode node", "id", (stream) => stream.decode || DASH],
    ["Prompt", "n", (stream) => number(stream.prompt_tokens)],
    ["Tokens", "n", (stream) => `${number(stream.tokens)} of ${number(stream.max_tokens)}`],
    ["Age", "n", (stream) => age(stream.age_s)],
    ["Failed attempts", "n", (stream) => number(stream.failures)],
  ], frame.streams);
}

function take(name, text) {
  const said = JSON.parse(text);
  if (name === "history") {
    points = said.points;
  } else {
    if (said.point && (!points.length || said.point[0] > points[points.length - 1][0])) points.push(said.point);
    points = points.slice(-KEPT_S);
    byId("board").hidden = false;
    byId("door").hidden = true;
    connection("live");
    show(said);
    plots();
  }
}

// --- the connection ----------------------------------------------------------------------------------------------

function connection(state, notice = "") {
  const found = byId("connection");
  if (found.dataset.state !== state) { // a status that is set anew is read out anew
    found.dataset.state = state;
    found.textContent = state;
  }
  byId("notice").hidden = !notice;
  if (byId("notice").textContent !== notice) byId("notice").textContent = notice;
}

function ask(message) {
  sessionStorage.removeItem("key");
  byId("board").hidden = true;
  byId("door").hidden = false;
  byId("refused").textContent = message;
  connection("key wanted");
  byId("key").focus();
}

class KeyWanted extends Error {}

// Not an EventSource: it can send no header.
async function listen() {
  const key = sessionStorage.getItem("key");
  live = new AbortController();
  let timer = setTimeout(() => live.abort(), SILENT_MS);
  try {
    const answer = await fetch("dashboard/events", { headers: key ? { Authorization: `Bearer ${key}` } : {}, signal: live.signal, cache: "no-store" });
    if (answer.status === 401) throw new KeyWanted(key ? "This router does not know that key." : "");
    if (!answer.ok) {
      const said = await answer.json().catch(() => ({}));
      throw new Error(said.error ? said.error.message : `status ${answer.status}`);
    }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the router has ended it");
      clearTimeout(timer);
      timer = setTimeout(() => live.abort(), SILENT_MS);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n");
        take(lines[0].slice("event: ".length), lines[1].slice("data: ".length));
        heard = true;
      }
    }
  } finally {
    clearTimeout(timer);
  }
}

let heard = false;

async function watch() {
  for (let failures = 0; ; failures += 1) {
    heard = false;
    try {
      await listen();
    } catch (error) {
      if (error instanceof KeyWanted) { ask(error.message); return; }
      if (heard) failures = 0;
      const reason = error.name === "AbortError" ? "it says nothing" : error instanceof TypeError ? "it does not answer" : error.message;
      connection("lost", `Connection to the router lost (${reason}). What is shown is old; trying again.`);
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS[Math.min(failures, AGAIN_MS.length - 1)]));
  }
}

byId("own-url").textContent = location.origin;
byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) { byId("refused").textContent = "A key has no spaces and no letters beyond ASCII."; return; }
  sessionStorage.setItem("key", key);
  byId("key").value = "";
  byId("refused").textContent = "";
  watch();
});
addEventListener("resize", () => { if (points.length) plots(); });
watch();
