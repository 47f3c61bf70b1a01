// The page is complete without this: it only adds sorting, and opens the panel that a link leads to.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const falls = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((each) => each.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const value = (row) => row.cells[column].textContent.trim().replaceAll(",", "");
      const compare = (one, other) => {
        const [a, b] = [value(one), value(other)];
        if (column === 0) return a.localeCompare(b, "en", { numeric: true });
        // Of an interval its lower end; no figure sorts before all others.
        const number = (text) => (text === "-" ? -2 : parseFloat(text.replace("\u2212", "-").replace("<", "")));
        return number(a) - number(b);
      };
      const rows = [...table.tBodies[0].rows].sort((one, other) => (falls ? -1 : 1) * compare(one, other));
      table.tBodies[0].append(...rows);
    });
  });
}
const open = () => {
  const panel = document.getElementById(location.hash.slice(1))?.closest(".panel");
  const input = panel && document.getElementById(panel.dataset.input);
  if (input) {
    input.checked = true;
    document.getElementById(location.hash.slice(1)).scrollIntoView();
  }
};
addEventListener("hashchange", open);
open();
