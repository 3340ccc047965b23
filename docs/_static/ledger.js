// Sorting and filters for the table of claims. Without this script the table is complete, in the ledger's order.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.getElementById("ledger");
  const form = document.querySelector(".ledger-filter");
  if (!table || !form) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  function matches(row, wanted) {
    return wanted.text.split(/\s+/).every((word) => text.get(row).includes(word))
      && ["status", "kind", "family"].every((name) => !wanted[name] || row.dataset[name] === wanted[name])
      && (!wanted.verdict || row.dataset.verdict.split(",").includes(wanted.verdict));
  }

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    wanted.text = wanted.text.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !matches(row, wanted);
      shown += !row.hidden;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length} claims`;
  }

  function key(row, column) {
    return row.querySelector(`td[data-column="${column}"]`).textContent.trim();
  }

  function sort(header) {
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const column = header.dataset.column;
    rows.sort((a, b) => (descending ? -1 : 1) * key(a, column).localeCompare(key(b, column)));
    body.append(...rows);
  }

  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sort(header));
    header.replaceChildren(button);
  }
  // A link such as ledger.html?text=kfac-2015 opens the table filtered.
  for (const [name, value] of new URLSearchParams(location.search)) {
    if (form.elements[name]) form.elements[name].value = value;
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
});
