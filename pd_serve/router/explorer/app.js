// Shows openapi.json and sends requests. Everything is text: nothing that a description or an answer holds becomes markup.
"use strict";

const DEEP = 3; // levels of a schema that are shown
let api = {};

function make(tag, text, ...inside) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...inside);
  return made;
}

function resolved(schema) {
  return schema?.$ref ? schema.$ref.split("/").slice(1).reduce((at, name) => at[name], api) : schema ?? {};
}

function typeOf(schema, depth = 0) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return [...new Set(several.map((one) => typeOf(one, depth)))].join(" | ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  if (schema.type === "array") return `list of ${depth < DEEP ? typeOf(schema.items, depth + 1) || "anything" : "…"}`;
  return [].concat(schema.type ?? "anything").join(" | ");
}

function fields(schema) {
  const whole = resolved(schema);
  const parts = whole.properties ? [whole] : (whole.anyOf ?? []).map(resolved);
  const table = make("table");
  for (const part of parts) {
    for (const [name, field] of Object.entries(part.properties ?? {})) {
      const needed = part.required?.includes(name) ? "needed" : "";
      table.append(make("tr", "", make("td", "", make("code", name)), make("td", typeOf(field)), make("td", needed)));
    }
  }
  return table;
}

function titled(title, ...inside) {
  return [make("h3", title), ...inside];
}

async function send(method, path, body, output) {
  output.hidden = false;
  output.textContent = "…";
  const headers = {};
  const key = document.getElementById("key").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    const answer = await fetch(path.slice(1), { method, headers, body });
    output.textContent = `${answer.status} ${answer.headers.get("content-type") ?? ""}\n\n`;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) output.append(part.value);
  } catch (error) {
    output.textContent = `no answer: ${error.message}`;
  }
}

function trial(method, path, operation, examples) {
  const output = make("pre");
  output.hidden = true;
  const area = make("textarea");
  area.setAttribute("aria-label", "request body");
  const choice = make("select");
  choice.setAttribute("aria-label", "example");
  for (const name of Object.keys(examples)) choice.append(make("option", name));
  const choose = () => { area.value = JSON.stringify(examples[choice.value]?.value ?? {}, null, 2); };
  choice.addEventListener("change", choose);
  choose();
  const inputs = (operation.parameters ?? []).map((parameter) => {
    const input = make("input");
    input.dataset.name = parameter.name;
    input.dataset.in = parameter.in;
    return input;
  });
  const button = make("button", "Send");
  button.type = "button";
  button.addEventListener("click", () => {
    let where = path;
    const query = new URLSearchParams();
    for (const input of inputs) {
      const value = input.value;
      if (input.dataset.in === "path") where = where.replace(`{${input.dataset.name}}`, encodeURI(value));
      else if (value) query.set(input.dataset.name, value);
    }
    if (query.size) where += `?${query}`;
    send(method, where, operation.requestBody ? area.value : undefined, output);
  });
  const found = inputs.map((input) => make("p", "", make("label", `${input.dataset.name} `, input)));
  if (operation.requestBody) found.push(choice, area);
  return [...found, button, output];
}

function described(path, method, operation) {
  const name = method.toUpperCase();
  const box = make("details", "", make("summary", "", make("b", name), make("code", path), operation.summary ?? ""));
  box.className = "operation";
  const fill = () => {
    const said = make("p", operation.description ?? "");
    said.className = "quiet";
    box.append(said);
    const content = operation.requestBody?.content["application/json"];
    if (content) box.append(...titled("Request", fields(content.schema)));
    box.append(...titled("Try it", ...trial(name, path, operation, content?.examples ?? {})));
    const table = make("table");
    for (const [status, answer] of Object.entries(operation.responses)) {
      const kinds = Object.entries(answer.content ?? {}).map(([kind, { schema }]) => `${kind}: ${typeOf(schema)}`);
      table.append(make("tr", "", make("td", status), make("td", answer.description), make("td", kinds.join(", "))));
    }
    box.append(...titled("Answers", table));
    const success = operation.responses["200"]?.content ?? {};
    if (success["application/json"]) box.append(...titled("Answer", fields(success["application/json"].schema)));
    const events = success["text/event-stream"]?.example;
    if (events) box.append(...titled("Events, with \"stream\": true", make("pre", events)));
  };
  box.addEventListener("toggle", fill, { once: true });
  return box;
}

async function main() {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`openapi.json: ${answer.status}`);
  api = await answer.json();
  document.getElementById("title").textContent = `${api.info.title} API, version ${api.info.version}`;
  document.getElementById("door").hidden = !api.components.securitySchemes;
  const main = document.getElementById("operations");
  for (const tag of api.tags) {
    const said = make("p", tag.description);
    said.className = "quiet";
    main.append(make("h2", tag.name), said);
    for (const [path, item] of Object.entries(api.paths)) {
      for (const [method, operation] of Object.entries(item)) {
        if (operation.tags?.includes(tag.name)) main.append(described(path, method, operation));
      }
    }
  }
}

main().catch((error) => {
  const notice = document.getElementById("notice");
  notice.textContent = error.message;
  notice.hidden = false;
});
