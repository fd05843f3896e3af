// The few things of a report that move: tables sorted by their headers, a filter of rows, a button that copies.
// Without this script the page shows everything all the same, in the order it was written.
"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead button").forEach((button) => {
    button.addEventListener("click", () => sort(table, button.closest("th")));
  });
}

// Sort by a column; once more turns the order round. Cells that hold nothing stay at the end either way.
function sort(table, head) {
  const column = [...head.parentElement.children].indexOf(head);
  const first = head.dataset.first || "ascending"; // scores: the worst first
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  const sign = order === "ascending" ? 1 : -1;
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row, index) => ({ row, index, value: valueOf(row.cells[column]) }));
  rows.sort((a, b) => {
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.index - b.index;
    return sign * compare(a.value, b.value) || a.index - b.index;
  });
  body.append(...rows.map((item) => item.row));
  for (const each of head.parentElement.children) {
    if (each.hasAttribute("aria-sort")) each.setAttribute("aria-sort", each === head ? order : "none");
  }
}

// What a cell is sorted by: its data-v, a number where it is one, or its text.
function valueOf(cell) {
  const text = cell.dataset.v ?? cell.textContent.trim();
  if (text === "" || text === "–") return null;
  const number = Number(text);
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

// Show the rows that hold all words of a filter, in any order.
for (const input of document.querySelectorAll("input[data-filters]")) {
  const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
  const said = document.getElementById(input.dataset.says);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    said.textContent = `${words.length ? `${shown} of ` : ""}${rows.length} row${rows.length === 1 ? "" : "s"}`;
  });
}

// Copy a text: by the clipboard where the browser allows it for a file, else by selecting it for Ctrl+C.
for (const button of document.querySelectorAll("button[data-copies]")) {
  const words = button.textContent;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copies);
    const selection = window.getSelection();
    selection.selectAllChildren(source);
    let done = false;
    try {
      await navigator.clipboard.writeText(source.innerText.trim());
      done = true;
    } catch {
      done = document.execCommand("copy");
    }
    if (done) selection.removeAllRanges();
    button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
    setTimeout(() => { button.textContent = words; }, 2500);
  });
}

// What scrolls can be reached by keyboard, and has a name.
function reachable() {
  for (const box of document.querySelectorAll(".scroll")) {
    const scrolls = box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1;
    if (scrolls) {
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", box.querySelector("caption b")?.textContent.replace(/\.$/, "") ?? "Table");
    } else {
      box.removeAttribute("tabindex");
      box.removeAttribute("role");
      box.removeAttribute("aria-label");
    }
  }
}
reachable();
window.addEventListener("resize", reachable);

// On paper nothing is folded away.
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((one) => { one.open = true; });
});
window.addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));
