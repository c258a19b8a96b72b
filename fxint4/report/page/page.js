"use strict";
const table = document.querySelector(".matmuls");
const body = document.querySelector(".matmuls tbody");
const details = JSON.parse(document.getElementById("details").textContent);
const search = document.getElementById("search");
const kind = document.getElementById("kind");

// Rows from the top, each with the rows that it folds.
const tops = [];
for (const row of body ? body.rows : []) {
  if (row.className === "member") tops.at(-1).members.push(row);
  else tops.push({ row, members: [] });
}
const singles = tops.flatMap(({ row, members }) => (members.length ? members : [row]));

// What rows are searched by, the details that are open (row -> row below it), the open folds.
const texts = new Map(singles.map((row) => [row, row.textContent.toLowerCase()]));
const opened = new Map();
const unfolded = new Set();
let sorted = null; // the column, and 1 or -1

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as HTML: names are not ours
  return made;
}

// --- order and search

const collator = new Intl.Collator("en", { numeric: true });

function keyOf(row) {
  const cell = row.cells[sorted.column];
  return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key);
}

function compare(a, b) {
  // What is missing stays at the end either way.
  if (a === "" || b === "") return (a === "") - (b === "");
  return sorted.sign * (typeof a === "number" ? a - b : collator.compare(a, b));
}

function inOrder(items, rowOf) {
  if (!sorted) return items;
  const keyed = items.map((item) => [keyOf(rowOf(item)), item]);
  return keyed.sort(([a], [b]) => compare(a, b)).map(([, item]) => item);
}

// Folds, or while there is a search all single rows, in the order of the sorted column.
function arrange() {
  const all = search.value.trim()
    ? [...tops.filter(({ members }) => members.length).map(({ row }) => row), ...inOrder(singles, (row) => row)]
    : inOrder(tops, ({ row }) => row).flatMap(({ row, members }) => [row, ...inOrder(members, (member) => member)]);
  body?.append(...all.flatMap((row) => (opened.has(row) ? [row, opened.get(row)] : [row])));
  filter();
}

function show(row, shown) {
  row.hidden = !shown;
  if (opened.has(row)) opened.get(row).hidden = !shown;
}

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (row) =>
    words.every((word) => texts.get(row).includes(word)) &&
    (!kind.value || row.dataset.kinds.split(" ").includes(kind.value));
  let count = 0;
  for (const { row, members } of tops) {
    const found = (members.length ? members : [row]).filter(matches);
    count += found.length;
    show(row, found.length > 0 && !(members.length && words.length));
    const matching = new Set(found);
    for (const member of members) {
      show(member, matching.has(member) && (words.length > 0 || unfolded.has(row)));
    }
  }
  document.getElementById("count").textContent = `${count} of ${singles.length}`;
  document.getElementById("nothing").hidden = count > 0;
}

document.getElementById("no-script").hidden = true;
document.querySelector("form").hidden = false;

let searched = "";
search.addEventListener("input", () => {
  const changed = Boolean(search.value.trim()) !== Boolean(searched);
  searched = search.value.trim();
  if (changed) arrange();
  else filter();
});
kind.addEventListener("change", filter);
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.matches("input, select")) {
    event.preventDefault();
    search.focus();
  }
});

// --- sort: up, down, and back to the first order

for (const head of document.querySelectorAll(".matmuls thead th")) {
  head.firstElementChild.addEventListener("click", () => {
    const next = { none: "ascending", ascending: "descending", descending: "none" };
    const order = next[head.getAttribute("aria-sort") ?? "none"];
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    sorted = order === "none" ? null : { column: head.cellIndex, sign: order === "ascending" ? 1 : -1 };
    if (sorted) head.setAttribute("aria-sort", order);
    arrange();
  });
}

// --- details

function side(name, title, lines, others, sign) {
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
    code.append(element("div", gap ? "gap" : line === null ? "empty" : changed ? name : "", text));
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
    sides.append(
      side("before", table.dataset.before, before, after, "-"),
      side("after", table.dataset.after, after, before, "+"),
    );
    box.append(sides);
  }
  return box;
}

function toggleDetails(row, button) {
  if (opened.has(row)) {
    opened.get(row).remove();
    opened.delete(row);
  } else {
    const below = element("tr", "opened");
    below.setAttribute("role", "row");
    const cell = element("td");
    cell.setAttribute("role", "cell");
    cell.colSpan = row.cells.length;
    cell.append(detailsOf(details[Number(button.dataset.record)]));
    below.append(cell);
    row.after(below);
    opened.set(row, below);
  }
  button.setAttribute("aria-expanded", String(opened.has(row)));
}

function toggleFold(row, button) {
  if (!unfolded.delete(row)) unfolded.add(row);
  button.setAttribute("aria-expanded", String(unfolded.has(row)));
  filter();
}

body?.addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  // Text that is being selected is not a click, nor is one in the details.
  if (row.className === "opened" || String(getSelection())) return;
  const button = row.querySelector("button");
  if (row.className === "group") toggleFold(row, button);
  else toggleDetails(row, button);
});

filter();
