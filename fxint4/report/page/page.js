
"use strict";
const body = document.querySelector("tbody");
const rows = body ? [...body.rows] : [];
const details = JSON.parse(document.getElementById("details").textContent);
const search = document.getElementById("search");
const action = document.getElementById("action");

// What rows are searched by, and the details that are open: row -> row below it.
const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
const opened = new Map();

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as HTML: names are not ours
  return made;
}

// --- search

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const text = texts.get(row);
    const kind = row.querySelector("td.action")?.textContent;
    const match = words.every((word) => text.includes(word)) && (!action.value || action.value === kind);
    row.hidden = !match;
    if (opened.has(row)) opened.get(row).hidden = !match;
    shown += match;
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length}`;
  document.getElementById("nothing").hidden = shown > 0;
}

search.addEventListener("input", filter);
action.addEventListener("change", filter);
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.matches("input, select")) {
    event.preventDefault();
    search.focus();
  }
});

// --- sort: up, down, and back to the order in which the matmuls run

const collator = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return typeof a === "number" ? a - b : collator.compare(a, b);
}

function sort(head) {
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  const order = next[head.getAttribute("aria-sort") ?? "none"];
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  let sorted = rows;
  if (order !== "none") {
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const keyed = rows.map((row) => {
      const cell = row.cells[head.cellIndex];
      return [cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key), row];
    });
    // What is missing stays at the end either way.
    keyed.sort(([a], [b]) => compare(a, b) * (a === "" || b === "" ? 1 : sign));
    sorted = keyed.map(([, row]) => row);
  }
  body.append(...sorted.flatMap((row) => (opened.has(row) ? [row, opened.get(row)] : [row])));
}

for (const head of document.querySelectorAll("th")) {
  head.firstElementChild.addEventListener("click", () => sort(head));
}

// --- details

function side(title, lines, others, sign) {
  const box = element("div", "side");
  box.append(element("h3", "", title));
  const code = element("div", "code");
  code.tabIndex = 0; // so that the keyboard scrolls it
  code.setAttribute("role", "group");
  code.setAttribute("aria-label", `graph ${title}`);
  lines.forEach((line, number) => {
    const gap = line === null && others[number] === null;
    const changed = line !== null && line !== others[number];
    const text = gap ? "⋯" : line === null ? "" : `${changed ? sign : " "} ${line}`;
    code.append(element("div", gap ? "gap" : line === null ? "empty" : changed ? title : "", text));
  });
  box.append(code);
  return box;
}

function detailsOf({ facts, lines }) {
  const box = element("div", "details");
  const list = element("dl");
  for (const [title, value] of facts) {
    const entry = element("div");
    entry.append(element("dt", "", title));
    for (const line of [value].flat()) entry.append(element("dd", "", line));
    list.append(entry);
  }
  box.append(list);
  if (lines.length) {
    const sides = element("div", "sides");
    const before = lines.map(([line]) => line);
    const after = lines.map(([, line]) => line);
    sides.append(side("before", before, after, "-"), side("after", after, before, "+"));
    box.append(sides);
  }
  return box;
}

function toggle(row) {
  const button = row.querySelector("button");
  const open = !opened.has(row);
  button.setAttribute("aria-expanded", String(open));
  if (!open) {
    opened.get(row).remove();
    opened.delete(row);
    return;
  }
  const below = element("tr", "opened");
  const cell = element("td");
  cell.colSpan = row.cells.length;
  cell.append(detailsOf(details[Number(button.dataset.record)]));
  below.append(cell);
  row.after(below);
  opened.set(row, below);
}

body?.addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  // Text that is being selected is not a click.
  if (texts.has(row) && !String(getSelection())) toggle(row);
});

filter();
