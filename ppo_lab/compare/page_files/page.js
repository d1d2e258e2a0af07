"use strict";
// The data come from page.py. Text that a model or a user wrote enters the page by textContent alone.

const DATA = JSON.parse(document.getElementById("data").textContent);
const HUES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#000000"];
const NO_VALUE = "#7f7f7f";
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#d8d219"];
const MOST_IN_LEGEND = 14;
const MOST_CELLS = 30;
const OPTIONS = { responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg" } };

const byId = (id) => document.getElementById(id);
// A key without its sections, but for those that tell it from the others; groups.py has the same rule.
function short(key) {
  const parts = key.split(".");
  const others = DATA.keys.filter((other) => other !== key).map((other) => "." + other);
  const names = parts.map((_, i) => parts.slice(-1 - i).join("."));
  return names.find((name) => !others.some((other) => other.endsWith("." + name))) ?? key;
}
const isNumber = (value) => typeof value === "number";
const round = (value) => (isNumber(value) ? String(Number(value.toPrecision(4))) : value ?? "–");
// A setting has at least six digits and as many more as tell it from the others of its key, a whole number all of them.
const setting = (key, value) => (isNumber(value) && !Number.isInteger(value) ? String(Number(value.toPrecision(digitsOf(key)))) : value ?? "–");
const enough = new Map();
function digitsOf(key) {
  const values = unique(DATA.runs.map((run) => run.config[key]).filter(isNumber));
  const alike = (digits) => unique(values.map((v) => v.toPrecision(digits))).length < values.length;
  for (let digits = 6; !enough.has(key); digits++) if (digits > 16 || !alike(digits)) enough.set(key, digits);
  return enough.get(key);
}
const unique = (values) => [...new Set(values)];
const asNumber = (value) => (typeof value === "string" && value.trim() ? Number(value) : isNumber(value) ? value : NaN);
function inOrder(a, b) {
  const difference = asNumber(a) - asNumber(b);
  return isNaN(difference) ? String(a).localeCompare(String(b), undefined, { numeric: true }) : difference;
}

// ---- Runs ------------------------------------------------------------------------------------------

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function curve(run, metric) {
  if (!(metric in run.curves)) return null;
  run.unpacked ??= {};
  const steps = run.curves["@" + metric] ?? run.curves["@"];
  run.unpacked[metric] ??= { x: unpack(steps), y: unpack(run.curves[metric]) };
  return run.unpacked[metric];
}

function value(run, key) {
  if (key === "group") return DATA.groups[run.group];
  if (key === "seed" || key === "status") return run[key];
  return run.config[key];
}

const title = (run) => {
  const settings = DATA.keys.map((key) => `${short(key)}=${setting(key, run.config[key])}`);
  return [run.name, ...settings, `seed=${run.seed ?? "–"}`, run.status].join(" ");
};
const hover = (run) => escaped(title(run));

// Plotly reads labels as a little HTML.
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function visibleRuns() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  // A whole value where one is named: seed=1 is not seed=10.
  const end = (word) => (/=\S+$/.test(word) ? `${word} ` : word);
  const exact = (run) => DATA.keys.map((key) => `${short(key)}=${run.config[key]}`);
  const text = (run) => `${[title(run), ...exact(run)].join(" ").toLowerCase()} `;
  return DATA.runs.filter((run) => words.every((word) => text(run).includes(end(word))));
}

function groupsOf(runs, of = (run) => run.group) {
  const groups = new Map();
  for (const run of runs) groups.set(of(run), [...(groups.get(of(run)) ?? []), run]);
  return [...groups.values()];
}

// ---- Colours ---------------------------------------------------------------------------------------

// A value has one colour in every panel, whichever of the runs the panel shows.
function colouring(runs) {
  const key = byId("colour").value;
  const valuesOf = (some) => unique(some.map((run) => value(run, key))).filter((v) => v !== undefined && v !== null);
  const values = valuesOf(DATA.runs.filter((run) => run.steps)).sort(inOrder);
  const numeric = values.every(isNumber) && key !== "seed";
  const colours = new Map(values.map((v, i) => [v, numeric ? along(i, values.length) : HUES[i % HUES.length]]));
  const shown = valuesOf(runs).length;
  return {
    of: (run) => colours.get(value(run, key)) ?? NO_VALUE,
    rank: (run) => 1000 + (values.indexOf(value(run, key)) + 1 || values.length + 1),
    label: (run) => `${short(key)}=${setting(key, value(run, key))}`,
    legend: shown > 1 && shown <= MOST_IN_LEGEND,
  };
}

function along(i, count) {
  return VIRIDIS[count < 2 ? 0 : Math.round((i / (count - 1)) * (VIRIDIS.length - 1))];
}

// Traces of one colour share a legend entry: the first one shows it.
function legendOnce(colours) {
  const seen = new Set();
  return (run) => {
    const label = colours.label(run);
    const first = !seen.has(label);
    seen.add(label);
    return { name: escaped(label), legendgroup: label, legendrank: colours.rank(run), showlegend: first && colours.legend, line: { color: colours.of(run), width: 1.4 } };
  };
}

// ---- Statistics over seeds -------------------------------------------------------------------------

function interval(values) {
  const known = values.filter((v) => isNumber(v) && isFinite(v));
  const n = known.length;
  if (!n) return { mean: null, half: null };
  const mean = known.reduce((a, b) => a + b, 0) / n;
  if (n < 2) return { mean, half: null };
  const variance = known.reduce((a, b) => a + (b - mean) ** 2, 0) / (n - 1);
  return { mean, half: DATA.t[Math.min(n - 2, DATA.t.length - 1)] * Math.sqrt(variance / n) };
}

function settled(runs) {
  const finished = runs.filter((run) => run.status === "finished");
  return finished.length ? finished : runs;
}

// Runs of one setting and one seed, as those of a copied sweep, are one value: they are no further draw. groups.py has
// the same rule.
const drawsOf = (runs) => groupsOf(runs, (run) => (isAbsent(run.seed) ? run : `${run.group} ${run.seed}`));
const isAbsent = (value) => value === undefined || value === null;
const meanOf = (runs, name) => interval(runs.map((run) => run.outcomes[name])).mean;
const outcome = (runs, name) => interval(drawsOf(settled(runs)).map((same) => meanOf(same, name)));
const average = (runs, name) => outcome(runs, name).mean;

// The mean curve of several seeds and their range; nothing where their steps differ, as in the PNG: no run is cut short.
function band(runs, metric) {
  const [first, ...others] = runs.map((run) => curve(run, metric));
  const same = others.every(({ x }) => x.length === first.x.length && x.every((step, i) => step === first.x[i]));
  if (!same) return null;
  const values = [...first.x].map((_, i) => [first, ...others].map(({ y }) => y[i]));
  const draws = drawsOf(runs);
  const means = [...first.x].map((_, i) => interval(draws.map((same) => interval(same.map((run) => curve(run, metric).y[i])).mean)).mean);
  return { x: first.x, y: means, low: values.map((v) => Math.min(...v)), high: values.map((v) => Math.max(...v)) };
}

// ---- Plots -----------------------------------------------------------------------------------------

function draw(id, traces, layout) {
  const place = byId(id);
  const wasAbsent = place.classList.contains("absent");
  place.classList.toggle("absent", !traces.length);
  if (!traces.length) {
    Plotly.purge(place);
    place.textContent = layout.absent ?? "nothing was measured";
    return;
  }
  if (wasAbsent) place.textContent = ""; // what was said in its place
  const rows = legendRows(traces, place);
  place.style.height = ""; // of the style sheet, and more for a long legend
  if (rows > 3) place.style.height = `${place.clientHeight + 20 * (rows - 3)}px`;
  const common = {
    margin: { l: 62, r: 12, t: 30, b: 48 + 20 * rows }, hovermode: "closest", font: { size: 12 },
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", tracegroupgap: 0 }, plot_bgcolor: "#fff", paper_bgcolor: "#fff",
  };
  if (layout.title) Object.assign(layout.title, { x: 0, xref: "paper", xanchor: "left" });
  Plotly.react(place, traces, { ...common, ...layout }, OPTIONS);
}

function legendRows(traces, place) {
  const entries = traces.filter((trace) => trace.name && trace.showlegend !== false);
  if (traces.length < 2 || !entries.length) return 0;
  const width = Math.max(...entries.map((trace) => 44 + 6 * trace.name.length)); // of each: they stand in columns
  return Math.ceil(entries.length / Math.max(1, Math.floor((place.clientWidth - 80) / width)));
}

const axis = (text, more) => ({ title: { text: escaped(text), standoff: 8 }, gridcolor: "#eceef1", zeroline: false, ...more });

function drawCurves(panel) {
  const metric = document.querySelectorAll("select.metric")[panel].value;
  const runs = visibleRuns().filter((run) => metric in run.curves);
  const colours = colouring(runs);
  const style = legendOnce(colours);
  const asBands = byId("bands").checked && byId("colour").value !== "seed";
  const traces = groupsOf(runs).flatMap((group) =>
    asBands && group.length > 1 ? bandTraces(group, metric, style, colours) : group.map((run) => lineTrace(run, metric, style)));
  const [unit] = DATA.metrics[metric] ?? [""];
  draw(`curve-${panel}`, traces, { xaxis: axis("iteration"), yaxis: axis(unit ? `${metric} (${unit})` : metric), absent: `no run logged ${metric}` });
}

function lineTrace(run, metric, style) {
  return { ...curve(run, metric), ...drawnAs(curve(run, metric).x, style(run)), ...named(hover(run)) };
}

// A line of one point is not seen: held-out metrics are measured once where evaluation.every is 0.
function drawnAs(x, style) {
  return { ...style, mode: x.length > 1 ? "lines" : "markers", marker: { color: style.line.color, size: 7 } };
}

// One text for all points of a trace: Plotly finds `text` in a template only where each point has its own.
const named = (text) => ({ meta: [text], hovertemplate: "%{y:.4g} at %{x}<br>%{meta[0]}<extra></extra>" });

function bandTraces(group, metric, style, colours) {
  const found = band(group, metric);
  if (!found) return group.map((run) => lineTrace(run, metric, style));
  const { x, y, low, high } = found;
  const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: colours.label(group[0]) };
  const fillcolor = colours.of(group[0]) + "2b";
  const text = escaped(`${DATA.groups[group[0].group]}, ${drawsOf(group).length} seeds`);
  return [
    { ...edge, y: low }, { ...edge, y: high, fill: "tonexty", fillcolor },
    { x, y, ...drawnAs(x, style(group[0])), ...named(text) },
  ];
}

// Columns of a run's evaluations: step, KL, held-out score, gold score.
function drawFrontier(id, column, name, what) {
  const runs = visibleRuns().map((run) => ({ run, path: run.evaluations.filter((p) => isNumber(p[1]) && isNumber(p[column])) }))
    .filter(({ path }) => path.length);
  const colours = colouring(runs.map(({ run }) => run));
  const style = legendOnce(colours);
  const paths = runs.map(({ run, path }) => ({
    x: path.map((p) => p[1]), y: path.map((p) => p[column]), mode: "lines", line: { color: colours.of(run), width: 0.7 }, opacity: 0.55, hoverinfo: "skip", showlegend: false,
  }));
  const ends = runs.map(({ run, path }) => endTrace(run, path.at(-1), column, style(run)));
  const front = paretoFront(runs.map(({ path }) => [path.at(-1)[1], path.at(-1)[column]]));
  const line = { x: front.map((p) => p[0]), y: front.map((p) => p[1]), mode: "lines", line: { color: "#000", width: 1.6, shape: "hv" }, name: "Pareto front", hoverinfo: "skip" };
  const traces = ends.length ? [...paths, line, ...ends] : [];
  draw(id, traces, { title: { text: what, font: { size: 13 } }, xaxis: axis("KL to the reference (nats/sequence)"), yaxis: axis(name), absent: `no run has a ${name}` });
}

function endTrace(run, point, column, style) {
  const marker = { size: 9, color: style.line.color, symbol: run.status === "finished" ? "circle" : "circle-open" };
  return { x: [point[1]], y: [point[column]], mode: "markers", ...style, marker, text: [hover(run)], hovertemplate: "%{y:.4g} at %{x:.4g} nats<br>%{text}<extra></extra>" };
}

function paretoFront(points) {
  const front = [];
  for (const [cost, gain] of [...points].sort((a, b) => a[0] - b[0] || b[1] - a[1]))
    if (!front.length || gain > front.at(-1)[1]) front.push([cost, gain]);
  return front;
}

function drawHeat() {
  const [x, y, name] = ["heat-x", "heat-y", "heat-value"].map((id) => byId(id).value);
  const placed = visibleRuns().filter((run) => value(run, x) !== undefined && value(run, y) !== undefined);
  const runs = placed.filter((run) => isNumber(run.outcomes[name]));
  const [xs, ys] = [x, y].map((key) => unique(runs.map((run) => value(run, key))).sort(inOrder));
  const cells = xs.length <= MOST_CELLS && ys.length <= MOST_CELLS;
  const traces = !runs.length ? [] : cells ? [heatTrace(placed, x, y, xs, ys, name)] : [cloudTrace(runs, x, y, name)];
  const type = (values) => (cells ? "category" : values.every((v) => v > 0) ? "log" : undefined);
  draw("heat", traces, {
    title: { text: escaped(cells ? name + pooledOver(runs, x, y) : name), font: { size: 13 } }, absent: `no run has a value of ${name}`,
    xaxis: axis(short(x), { type: type(xs), ...(cells && ticks(x, xs)) }), yaxis: axis(short(y), { type: type(ys), ...(cells && ticks(y, ys)) }),
  });
}

// What runs of one cell differ in.
function pooledOver(runs, x, y) {
  const cellOf = (run) => JSON.stringify([value(run, x), value(run, y)]);
  const varies = (key) => unique(runs.map((run) => cellOf(run) + JSON.stringify(value(run, key)))).length > unique(runs.map(cellOf)).length;
  const names = [...DATA.keys, "seed"].filter(varies).map(short);
  return names.length ? `, mean over ${names.join(", ")}` : "";
}

const ticks = (key, values) => ({ tickvals: values.map(String), ticktext: values.map((v) => escaped(setting(key, v))) });

function heatTrace(runs, x, y, xs, ys, name) {
  const z = ys.map((up) => xs.map((across) => average(runs.filter((run) => value(run, x) === across && value(run, y) === up), name)));
  return { type: "heatmap", x: xs.map(String), y: ys.map(String), z, text: z.map((row) => row.map((v) => (v === null ? "" : round(v)))),
    texttemplate: xs.length * ys.length <= 60 ? "%{text}" : "", colorscale: "Viridis", xgap: 1, ygap: 1, hovertemplate: "%{x}, %{y}: %{z:.4g}<extra></extra>" };
}

function cloudTrace(runs, x, y, name) {
  const color = runs.map((run) => run.outcomes[name]);
  return { mode: "markers", x: runs.map((run) => value(run, x)), y: runs.map((run) => value(run, y)), text: runs.map(hover),
    marker: { size: 10, color, colorscale: "Viridis", showscale: true }, hovertemplate: "%{marker.color:.4g}<br>%{text}<extra></extra>" };
}

function drawClip() {
  const key = "ppo.cliprange";
  const epsilon = (run) => run.config[key] ?? epsilonOf(run);
  const counted = groupsOf(visibleRuns(), epsilon).flatMap(settled);
  const runs = counted.filter((run) => isNumber(run.outcomes.clip_fraction) && isNumber(epsilon(run)));
  const values = unique(runs.map(epsilon)).sort(inOrder);
  const means = values.map((v) => average(runs.filter((run) => epsilon(run) === v), "clip_fraction"));
  const points = { mode: "markers", x: runs.map((r) => String(epsilon(r))), y: runs.map((r) => r.outcomes.clip_fraction), text: runs.map(hover),
    marker: { color: "#56b4e9", opacity: 0.6 }, name: "a run", hovertemplate: "%{y:.2%}<br>%{text}<extra></extra>" };
  const line = { mode: "lines+markers", x: values.map(String), y: means, line: { color: "#0072b2" }, name: "mean" };
  const limit = { type: "line", xref: "paper", x0: 0, x1: 1, y0: DATA.bindsFrom, y1: DATA.bindsFrom, line: { dash: "dot", color: "#a40000" } };
  draw("clip", runs.length ? [points, line] : [], {
    title: { text: "share of tokens clipped, mean over training", font: { size: 13 } }, shapes: [limit], absent: "no run has a clip fraction",
    xaxis: axis("cliprange (epsilon)", { type: "category", categoryorder: "array", categoryarray: values.map(String) }), yaxis: axis("clip_fraction", { tickformat: ".1~%", rangemode: "tozero" }),
  });
  const idle = values.filter((v, i) => means[i] !== null && means[i] < DATA.bindsFrom);
  byId("clip-note").textContent = idle.length
    ? `Below the dotted line (1 %) epsilon hardly ever binds: cliprange = ${idle.join(", ")}. More ppo_epochs or a higher learning_rate make it matter.`
    : "Epsilon binds on more than 1 % of the tokens (dotted line) at every value shown.";
}

// Where epsilon is the same in all runs, it is no differing key; the metric of that name tells it.
const epsilonOf = (run) => {
  const found = curve(run, "cliprange");
  return found ? Number(found.y[0].toPrecision(6)) : undefined;
};

function drawParallel() {
  const runs = visibleRuns().filter((run) => isNumber(run.outcomes.objective));
  const names = ["eval/kl", "eval/gold", "eval/mean_reward", "clip_fraction", "objective"];
  const measured = names.filter((name) => runs.every((run) => isNumber(run.outcomes[name])));
  const dimensions = [...DATA.keys.slice(0, 10).map((key) => settingAxis(key, runs)),
    ...measured.map((name) => ({ label: name, values: runs.map((run) => run.outcomes[name]) }))];
  const line = { color: runs.map((run) => run.outcomes.objective), colorscale: "Viridis", showscale: true, colorbar: { title: { text: "objective" } } };
  draw("parallel", runs.length > 1 ? [{ type: "parcoords", dimensions, line }] : [],
    { margin: { l: 70, r: 40, t: 60, b: 24 }, absent: "it needs two runs with an objective" });
}

// Numbers that span decades stand on a logarithmic axis; words and truth values on a list.
function settingAxis(key, runs) {
  const values = runs.map((run) => value(run, key));
  const ticks = unique(values).sort(inOrder);
  const many = ticks.length > 12;
  if (!values.every(isNumber))
    return { label: short(key), values: values.map((v) => ticks.indexOf(v)), tickvals: ticks.map((_, i) => i), ticktext: ticks.map((v) => String(v ?? "–")) };
  const decades = ticks[0] > 0 && ticks.at(-1) / ticks[0] > 30;
  const place = decades ? Math.log10 : (v) => v;
  const marks = decades && many ? [0, 0.25, 0.5, 0.75, 1].map((f) => ticks[Math.round(f * (ticks.length - 1))]) : ticks;
  return { label: short(key), values: values.map(place), ...(many && !decades ? {} : { tickvals: marks.map(place), ticktext: marks.map((v) => String(setting(key, v))) }) };
}

function drawFits() {
  byId("fits").replaceChildren(...DATA.fits.map((fit, i) => {
    const place = element("div");
    place.append(element("p", fit.task ? `${fit.task}: ${fit.text}` : fit.text));
    if (fit.d) place.append(Object.assign(element("div"), { id: `fit-${i}`, className: "plot tall" }));
    return place;
  }));
  DATA.fits.forEach((fit, i) => fit.d && drawFit(fit, `fit-${i}`));
}

function drawFit(fit, id) {
  const traces = [["proxy", "#e69f00"], ["gold", "#0072b2"]].flatMap(([name, color]) => [
    { x: fit.d, y: fit[name].gains, mode: "markers", marker: { color, size: 5, opacity: 0.45 }, name: `${name}, an evaluation` },
    { x: fit.grid, y: fit[name].line, mode: "lines", line: { color, width: 2 }, name: `${name}, fitted` },
  ]);
  const peak = fit.gold.peak;
  const shown = isNumber(peak) && peak <= fit.grid.at(-1);
  const shapes = shown ? [{ type: "line", x0: peak, x1: peak, yref: "paper", y0: 0, y1: 1, line: { dash: "dash", color: "#0072b2" } }] : [];
  const annotations = shown ? [{ x: peak, y: 1, yref: "paper", text: `gold peaks at ${round(peak ** 2)} nats`, showarrow: false, xanchor: "left", xshift: 5 }] : [];
  draw(id, traces, { xaxis: axis("d = sqrt(KL), KL in nats/sequence"), yaxis: axis("gain over the reference"), shapes, annotations });
}

// ---- Tables ----------------------------------------------------------------------------------------

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const sorting = { column: null, falling: true };

function drawTable() {
  const groups = groupsOf(visibleRuns()).sort((a, b) => a[0].group - b[0].group);
  const names = Object.keys(DATA.outcomes).filter((name) => DATA.runs.some((run) => isNumber(run.outcomes[name])));
  const columns = [
    ...(DATA.keys.length ? DATA.keys.map((key) => ({ title: short(key), hint: key, of: (group) => value(group[0], key), text: (cell) => setting(key, cell) })) : []),
    { title: "runs", wide: true, of: (group) => group.map((run) => run.name).join(", ") },
    { title: "status", of: statusOf },
    ...names.map((name) => ({ title: name, hint: DATA.outcomes[name], number: true, of: (group) => outcome(group, name) })),
  ];
  const rows = groups.map((group) => ({ group, cells: columns.map((column) => column.of(group)) }));
  if (sorting.column !== null) rows.sort((a, b) => bySortKey(a.cells[sorting.column], b.cells[sorting.column]) * (sorting.falling ? -1 : 1));
  const head = element("tr");
  head.append(...columns.map((column, i) => heading(column, i)));
  byId("table").replaceChildren(head, ...rows.map((row) => tableRow(row, columns)));
}

const sortKey = (cell) => (cell && typeof cell === "object" ? cell.mean ?? -Infinity : cell ?? "");
const bySortKey = (a, b) => inOrder(sortKey(a), sortKey(b));

function heading(column, i) {
  const chosen = sorting.column === i;
  const made = element("th");
  const button = element("button", column.title + (chosen ? (sorting.falling ? " ▾" : " ▴") : ""));
  made.append(button);
  made.title = column.hint ?? "";
  if (chosen) made.ariaSort = sorting.falling ? "descending" : "ascending";
  button.onclick = () => {
    Object.assign(sorting, { column: i, falling: chosen ? !sorting.falling : true });
    drawTable();
    byId("table").querySelectorAll("button")[i].focus();
  };
  return made;
}

function statusOf(group) {
  const counts = new Map();
  for (const run of group) counts.set(run.status, (counts.get(run.status) ?? 0) + 1);
  return [...counts].map(([status, count]) => (group.length > 1 ? `${count} ${status}` : status)).join(", ");
}

function tableRow({ group, cells }, columns) {
  const row = element("tr");
  row.append(...columns.map((column, i) => {
    if (!column.number) return element("td", column.text ? column.text(cells[i]) : cells[i], isNumber(cells[i]) ? "number" : column.wide ? "names" : "word");
    const { mean, half } = cells[i];
    return element("td", mean === null ? "–" : round(mean) + (half === null ? "" : ` ± ${Number(half.toPrecision(2))}`), "number");
  }));
  if (group.some((run) => !["finished", "running", "preempted"].includes(run.status))) {
    row.className = "bad";
    row.title = group.map((run) => run.reason).filter(Boolean).join("\n");
  }
  return row;
}

function drawSamples() {
  const [left, right] = ["left", "right"].map((id) => DATA.runs[byId(id).value]);
  const table = byId("samples");
  if (!left) return table.replaceChildren(element("caption", "no run kept samples"));
  const head = element("tr");
  head.append(...["prompt", "reference", title(left), title(right)].map((text) => element("th", text)));
  const others = new Map(right.samples.map((sample) => [sample[0], sample]));
  const rows = left.samples.map((sample) => sampleRow(sample, others.get(sample[0])));
  return table.replaceChildren(head, ...rows);
}

// A sample's fields: prompt, response, score, gold, reference response, its score, its gold.
function sampleRow(left, right) {
  const row = element("tr");
  row.append(element("td", words(left[0]), "text"), answer(left[4], left[5], left[6]), answer(left[1], left[2], left[3]),
    right ? answer(right[1], right[2], right[3]) : element("td", "not asked"));
  return row;
}

const words = (number) => (isNumber(number) ? DATA.texts[number] ?? "[left out: no room]" : "–");

function answer(text, score, gold) {
  const cell = element("td", words(text), "text");
  const scores = [isNumber(score) ? `score ${round(score)}` : "", isNumber(gold) ? `gold ${round(gold)}` : ""];
  cell.append(element("span", scores.filter(Boolean).join(", "), "score"));
  return cell;
}

function drawDiffers() {
  const run = DATA.runs[byId("run").value];
  const head = element("tr");
  head.append(...["key", "this run", "the others"].map((text) => element("th", text)));
  const rows = DATA.differing.map((key, i) => {
    const row = element("tr");
    row.append(...[key, run?.differing[i], othersValues(run, i)].map((text) => element("td", text)));
    return row;
  });
  const where = element("caption", run ? `${run.path}${run.reason ? ` – ${run.reason}` : ""}` : "");
  byId("differs").replaceChildren(where, head, ...rows);
}

function othersValues(run, i) {
  const values = unique(DATA.runs.filter((other) => other !== run).map((other) => other.differing[i])).sort(inOrder);
  return values.length > 12 ? `${values.slice(0, 12).join(", ")}, ... (${values.length} values)` : values.join(", ");
}

// ---- Controls --------------------------------------------------------------------------------------

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => Object.assign(element("option", text), { value })));
  if (options.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

function setUp() {
  byId("remarks").append(...DATA.remarks.map((text) => element("li", text)));
  const keys = DATA.keys.map((key) => [key, short(key)]);
  fill(byId("colour"), [...keys, ["group", "group"], ["seed", "seed"], ["status", "status"]], DATA.keys[0]);
  const metrics = Object.keys(DATA.metrics).map((name) => [name, name]);
  for (const select of document.querySelectorAll("select.metric")) fill(select, metrics, select.dataset.default);
  const names = Object.keys(DATA.outcomes).map((name) => [name, name]);
  fill(byId("heat-value"), names, "objective");
  fill(byId("heat-x"), [...keys, ["seed", "seed"]], DATA.keys[0]);
  fill(byId("heat-y"), [...keys, ["seed", "seed"]], DATA.keys[1] ?? "seed");
  const ranked = DATA.runs.map((run, i) => [i, title(run), run]).sort((a, b) => (b[2].outcomes.objective ?? -Infinity) - (a[2].outcomes.objective ?? -Infinity));
  const withSamples = ranked.filter(([, , run]) => run.samples.length);
  fill(byId("left"), withSamples, withSamples[0]?.[0]);
  fill(byId("right"), withSamples, withSamples.at(-1)?.[0]);
  fill(byId("run"), ranked, ranked[0]?.[0]);
  byId("curve-note").textContent = `Thin lines: one run each. Bands: the mean over seeds and their range, where all have the same iterations. Curves longer than ${DATA.points} points are means over stretches of iterations.`;
}

const SECTIONS = [
  ["table", drawTable], ["curve-0", () => drawCurves(0)], ["curve-1", () => drawCurves(1)], ["curve-2", () => drawCurves(2)],
  ["frontier-score", () => drawFrontier("frontier-score", 2, "held-out score", "score (what is optimised)")],
  ["frontier-gold", () => drawFrontier("frontier-gold", 3, "gold score", "gold score (never seen in training)")],
  ["heat", drawHeat], ["clip", drawClip], ["parallel", drawParallel], ["fits", drawFits], ["samples", drawSamples], ["differs", drawDiffers],
];

// A section is drawn when it comes near the window, and again when it is stale; one at a time, so that the page answers
// in between.
const stale = new Set();
const near = new Set();
let waiting = false;
const drawers = new Map(SECTIONS);

function refresh(ids) {
  ids.forEach((id) => stale.add(id));
  const next = [...stale].find((id) => near.has(id));
  if (next === undefined || waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    stale.delete(next);
    drawers.get(next)();
    refresh([]);
  });
}

function main() {
  setUp();
  const all = SECTIONS.map(([id]) => id);
  const watcher = new IntersectionObserver((entries) => {
    entries.forEach((entry) => (entry.isIntersecting ? near.add(entry.target.id) : near.delete(entry.target.id)));
    refresh([]);
  }, { rootMargin: "400px" });
  all.forEach((id) => stale.add(id));
  all.forEach((id) => watcher.observe(byId(id)));
  window.addEventListener("beforeprint", () => { [...stale].forEach((id) => drawers.get(id)()); stale.clear(); });
  const count = () => (byId("shown").textContent = `${visibleRuns().length} of ${DATA.runs.length} runs`);
  count();
  byId("filter").oninput = () => { count(); refresh(all.filter((id) => !["fits", "samples", "differs"].includes(id))); };
  byId("colour").onchange = byId("bands").onchange = () => refresh(all.filter((id) => /^(curve|frontier)/.test(id)));
  document.querySelectorAll("select.metric").forEach((select, i) => (select.onchange = () => refresh([`curve-${i}`])));
  for (const id of ["heat-x", "heat-y", "heat-value"]) byId(id).onchange = () => refresh(["heat"]);
  byId("left").onchange = byId("right").onchange = () => refresh(["samples"]);
  byId("run").onchange = () => refresh(["differs"]);
}

main();
