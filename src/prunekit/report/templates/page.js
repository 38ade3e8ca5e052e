"use strict";
// Tables that can be sorted: a heading becomes a button, which sorts up, then down. What has no key stays at the end.
for (const hint of document.querySelectorAll(".scripted")) hint.hidden = false;
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.key;
      const keyed = [...body.rows].filter((row) => key(row) !== undefined);
      const rest = [...body.rows].filter((row) => key(row) === undefined);
      const numbers = keyed.every((row) => key(row) !== "" && Number.isFinite(Number(key(row))));
      const order = numbers
        ? (one, other) => Number(key(one)) - Number(key(other))
        : (one, other) => key(one).localeCompare(key(other), "en", { numeric: true });
      keyed.sort((one, other) => (up ? order(one, other) : order(other, one)));
      body.append(...keyed, ...rest);
    });
  });
}

// Pictures: the point nearest to the pointer is marked and put into words below.
for (const canvas of document.querySelectorAll(".canvas[data-points]")) {
  const points = JSON.parse(canvas.dataset.points);
  const svg = canvas.querySelector("svg");
  const readout = canvas.nextElementSibling;
  const rest = "Point at the picture to read its figures.";
  const mark = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  mark.setAttribute("class", "pointed");
  mark.setAttribute("r", "6");
  readout.hidden = false;
  readout.textContent = rest;
  const show = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const far = (point) => Math.hypot(point.x - place.x, (point.y - place.y) / 3); // along is what one aims at
    const nearest = points.reduce((best, point) => (far(point) < far(best) ? point : best));
    mark.setAttribute("cx", nearest.x);
    mark.setAttribute("cy", nearest.y);
    svg.append(mark);
    readout.textContent = nearest.text;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    mark.remove();
    readout.textContent = rest;
  });
}

// The heat map: what a cell's title says, below the table, where it can be read on a phone too.
for (const heat of document.querySelectorAll("table.heat")) {
  const readout = document.getElementById("heat-readout");
  const rest = "Point at a cell to read what it stands for.";
  readout.hidden = false;
  readout.textContent = rest;
  const show = (event) => {
    const cell = event.target.closest("td[title]");
    readout.textContent = cell === null ? rest : cell.title;
  };
  heat.addEventListener("pointerover", show);
  heat.addEventListener("click", show);
  heat.addEventListener("pointerleave", () => { readout.textContent = rest; });
}
