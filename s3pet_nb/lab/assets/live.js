const fetched = async (source) => {
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  await import(url);
  URL.revokeObjectURL(url);
};
const load = async (source) => {
  if (!globalThis.Plotly) {
    await (globalThis.s3petPlotly ??= fetched(source));
  }
  return globalThis.Plotly;
};

export default { render({ model, el }) {
  const places = [], drawn = [];
  const draw = async () => {
    const plotly = await load(model.get("source"));
    const figures = structuredClone(model.get("figures")), again = places.length >= figures.length;
    const start = performance.now();
    drawn.splice(figures.length);
    for (const place of places.splice(figures.length)) {
      plotly.purge(place);
      place.remove();
    }
    await Promise.all(figures.map(({ data, layout, config }, k) => {
      const asked = JSON.stringify([data, layout, config]);
      if (drawn[k] === asked) {
        return undefined;
      }
      drawn[k] = asked;
      places[k] ??= el.appendChild(document.createElement("div"));
      return plotly.react(places[k], data, layout, { displaylogo: false, responsive: true, ...config });
    }));
    model.send({ seconds: again ? (performance.now() - start) / 1000 : 0 });
  };
  model.on("change:figures", draw);
  draw();
  return () => places.forEach((place) => globalThis.Plotly?.purge(place));
} };
