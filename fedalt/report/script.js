for (const head of document.querySelectorAll(".sortable thead tr:last-child th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const column = head.cellIndex, body = head.closest("table").tBodies[0];
    const sign = head.ariaSort === "descending" ? 1 : -1;
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const key = row => row.cells[column].textContent, value = row => parseFloat(key(row));
    const compare = (a, b) => column
      ? (isNaN(value(a)) - isNaN(value(b)) || sign * (value(a) - value(b)))
      : sign * key(a).localeCompare(key(b), undefined, {numeric: true});
    body.append(...[...body.rows].sort(compare));
  };
}
const hints = new ResizeObserver(entries => {
  for (const {target} of entries) {
    const shown = target.parentNode.classList;
    shown.toggle("wider", target.scrollWidth > target.clientWidth + 1);
    shown.toggle("longer", target.scrollHeight > target.clientHeight + 1);
  }
});
for (const table of document.querySelectorAll(".scrolls > .wide")) hints.observe(table);
