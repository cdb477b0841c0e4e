// Draws every figure from the JSON that stands beside it. Nothing is fetched and nothing is evaluated.
"use strict";
const PAPER_COLUMN = 332; // pixels: half of an A4 or Letter page between ordinary margins

// With a view box a drawing follows the width that print gives it, whatever the paper.
function fit(place) {
  for (const svg of place.querySelectorAll("svg.main-svg")) {
    svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
  }
}

const places = [];
for (const data of document.querySelectorAll("script[type='application/json'][data-figure]")) {
  const place = document.getElementById(data.dataset.figure);
  const { data: traces, layout } = JSON.parse(data.textContent);
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { format: "svg", filename: data.dataset.figure },
  };
  Plotly.newPlot(place, traces, layout, config).then(() => {
    fit(place);
    place.on("plotly_afterplot", () => fit(place));
    place.dataset.drawn = "yes";
  });
  places.push(place);
}
addEventListener("beforeprint", () => places.forEach((place) => Plotly.relayout(place, { width: PAPER_COLUMN })));
addEventListener("afterprint", () => places.forEach((place) => Plotly.relayout(place, { width: null, autosize: true })));
