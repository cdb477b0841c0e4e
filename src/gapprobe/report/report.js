// Draws every figure from the JSON that stands beside it. Nothing is fetched and nothing is evaluated.
"use strict";
for (const data of document.querySelectorAll("script[type='application/json'][data-figure]")) {
  const place = document.getElementById(data.dataset.figure);
  const figure = JSON.parse(data.textContent);
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { format: "svg", filename: data.dataset.figure },
  };
  // With a view box the drawing follows the paper's width when the page is printed.
  const fit = () => {
    for (const svg of place.querySelectorAll("svg.main-svg")) {
      svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
    }
  };
  Plotly.newPlot(place, figure.data, figure.layout, config).then(() => {
    fit();
    place.on("plotly_afterplot", fit);
    place.dataset.drawn = "yes";
  });
}
