// The page around the map. Every text of the cube comes from a stranger: it goes into the page as text, never as markup.
import { TileMap, toLat, toLon, toX, toY } from "./map.js";

const $ = (id) => document.getElementById(id);
const state = { info: null, part: null, at: 0, place: null, series: null, playing: false };

const map = new TileMap($("map"), {
  moved: () => {
    scale();
    remember();
  },
  pointed: under,
  picked: pick,
  settled: () => {
    $("message").hidden = true;
    if (state.playing) later();
  },
  failed: () => say("Some of the map could not be read; it is tried again."),
});

// -- small things -----------------------------------------------------------------------------------------------------

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function element(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function swatch(colour) {
  const made = element("i", undefined, "swatch");
  paint(made, colour);
  return made;
}

function paint(box, colour) {
  box.style.backgroundColor = colour ?? "transparent"; // the server lets through #rrggbb alone
  box.classList.toggle("empty", !colour);
}

const classOf = (code) => state.part.classes.find((c) => c.code === code);
const nameOf = (code) => classOf(code)?.name ?? state.part.fill;
const yearAt = (i) => state.part.years[i];

function degrees(lon, lat, places = 3) {
  const one = (v, signs) => `${Math.abs(v).toFixed(places)}°\u202f${signs[v >= 0 ? 1 : 0]}`;
  return `${one(lat, "SN")}, ${one(lon, "WE")}`;
}

function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function linked(text, address) {
  const made = element("a", text);
  made.href = address;
  made.rel = "noopener noreferrer";
  return made;
}

// Web addresses and DOIs in a text as links, all else as it is.
function withLinks(text) {
  return text.split(/(https?:\/\/[^\s<>"';,)]+|\bdoi:10\.\d{4,9}\/[^\s<>"';,)]+)/i).map((piece, i) => {
    const address = i % 2 ? webAddress(piece.replace(/^doi:/i, "https://doi.org/")) : null;
    return address ? linked(piece, address) : piece;
  });
}

async function json(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
  return answer.json();
}

// -- the cube ---------------------------------------------------------------------------------------------------------

async function start() {
  try {
    state.info = await json("info.json");
  } catch (error) {
    return say(`The cube cannot be read: ${error.message}`);
  }
  const asked = new URLSearchParams(location.hash.slice(1));
  const { parts } = state.info;
  $("parts").hidden = parts.length < 2;
  $("part").replaceChildren(...parts.map((part) => new Option(part.name, part.name)));
  choose(parts.find((part) => part.name === asked.get("part")) ?? parts[0], Number(asked.get("year")) || undefined);
  const [lat, lon, zoom] = ["lat", "lon", "zoom"].map((key) => parseFloat(asked.get(key)));
  if ([lat, lon, zoom].every(Number.isFinite)) map.go(toX(lon), toY(lat), zoom);
}

function choose(part, year) {
  const wide = state.part && state.part.bounds.join() === part.bounds.join();
  state.part = part;
  $("part").value = part.name;
  const title = part.title || "Land cover";
  $("title").textContent = document.title = title;
  const facts = [part.years.length === 1 ? "1 year" : `${part.years.length} years`, `${part.classes.length} classes`, `cells of ${part.cell}`];
  if (part.zooms[0] > 1) facts.push("no overviews, so seen from near only");
  $("about").textContent = facts.join(" · ");
  $("year").max = part.years.length - 1;
  $("first").textContent = yearAt(0);
  $("last").textContent = yearAt(part.years.length - 1);
  $("play").disabled = $("year").disabled = part.years.length < 2;
  legend();
  credit();
  const nearest = year === undefined ? part.years.length - 1 : closest(part.years, year);
  state.at = nearest;
  map.show(part, state.info.version, yearAt(nearest));
  if (!wide) map.home();
  told();
  if (state.place) pick(...state.place);
}

function closest(years, year) {
  return years.reduce((best, y, i) => (Math.abs(y - year) < Math.abs(years[best] - year) ? i : best), 0);
}

function legend() {
  $("classes").replaceChildren(
    ...state.part.classes.map((c, i) => {
      const row = element("li");
      const button = element("button", undefined, "class");
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.title = "Let this class stand out";
      button.append(swatch(c.colour), element("span", c.name));
      button.addEventListener("click", () => {
        const only = map.only === i ? null : i;
        map.setOnly(only);
        for (const [k, other] of [...$("classes").querySelectorAll("button")].entries()) {
          other.setAttribute("aria-pressed", String(k === only));
        }
        $("classes").classList.toggle("some", only !== null);
      });
      row.append(button);
      return row;
    }),
  );
  $("classes").classList.remove("some");
}

function credit() {
  const { part, info } = state;
  const pieces = [];
  for (const [label, text] of [
    ["Data", part.attribution],
    ["Licence", part.license],
    ["Source", part.source],
    ["Reference", part.references],
  ]) {
    if (!text) continue;
    const piece = element("span", `${label}: `);
    piece.append(...withLinks(text));
    pieces.push(piece);
  }
  $("credit").replaceChildren(...pieces);
  const links = [];
  if (info.catalogue) links.push(linked("STAC catalogue", info.catalogue));
  if (info.cube === "cube" || webAddress(info.cube)) links.push(linked("Data (Zarr)", `${info.cube}/zarr.json`));
  else if (info.cube) links.push(element("span", `Data (Zarr): ${info.cube}`));
  $("links").replaceChildren(...links);
}

// -- years ------------------------------------------------------------------------------------------------------------

function told() {
  const year = yearAt(state.at);
  $("year").value = state.at;
  $("year").setAttribute("aria-valuetext", String(year));
  $("shown").textContent = year;
  $("year").style.setProperty("--done", `${(100 * state.at) / Math.max(1, state.part.years.length - 1)}%`);
}

function setYear(at) {
  const n = state.part.years.length;
  state.at = ((at % n) + n) % n;
  told();
  map.setYear(yearAt(state.at));
  remember();
  if (state.place) {
    class_();
    clearTimeout(state.asking);
    state.asking = setTimeout(shares, state.playing ? 0 : 150);
  }
}

function play(on) {
  state.playing = on && state.part?.years.length > 1;
  $("play").setAttribute("aria-pressed", String(state.playing));
  $("play").setAttribute("aria-label", state.playing ? "Stop" : "Play the years");
  clearTimeout(state.timer);
  state.timer = 0;
  if (!state.playing) return map.prefetch(undefined);
  state.stepped = performance.now() - 1000;
  map.draw();
}

// A year stays for 0.7 s, and until its tiles are there; those of the next one are on their way meanwhile.
function later() {
  const next = (state.at + 1) % state.part.years.length;
  if (map.next !== yearAt(next)) map.prefetch(yearAt(next));
  state.timer ||= setTimeout(
    () => {
      state.timer = 0;
      state.stepped = performance.now();
      if (state.playing) setYear(next);
    },
    Math.max(20, 700 - (performance.now() - state.stepped)),
  );
}

// -- places -----------------------------------------------------------------------------------------------------------

function under(index, lon, lat) {
  $("under").hidden = index === undefined;
  if (index === undefined) return;
  const c = index === null ? null : state.part.classes[index];
  const same = c ? state.part.classes.filter((other) => other.colour === c.colour) : [];
  paint($("under").querySelector("i"), c?.colour);
  $("under").querySelector("b").textContent = c ? same.map((other) => other.name).join(" or ") : state.part.fill;
  $("under").querySelector("span").textContent = degrees(lon, lat, 2);
}

async function pick(lon, lat) {
  state.place = [lon, lat];
  state.series = null;
  map.setPin(state.place);
  const asked = state.place;
  try {
    const series = await json(`series.json?${query()}`);
    if (state.place !== asked) return;
    state.series = series;
  } catch (error) {
    if (state.place === asked) say(`The place cannot be read: ${error.message}`);
    return;
  }
  $("hint").hidden = true;
  $("found").hidden = false;
  $("where").textContent = degrees(lon, lat);
  strip();
  class_();
  shares();
  $("spoken").textContent = `${degrees(lon, lat)}, ${yearAt(state.at)}: ${nameOf(state.series.codes[state.at])}`;
}

function forget() {
  state.place = state.series = null;
  map.setPin(null);
  $("hint").hidden = false;
  $("found").hidden = true;
}

function query() {
  const [lon, lat] = state.place;
  return new URLSearchParams({ lon, lat, ...(state.part.name && { part: state.part.name }) });
}

function class_() {
  if (!state.series) return;
  const code = state.series.codes[state.at];
  paint($("what").querySelector("i"), classOf(code)?.colour);
  $("what").querySelector("b").textContent = nameOf(code);
  $("strip").style.setProperty("--at", `${(100 * (state.at + 0.5)) / state.part.years.length}%`);
  for (const run of $("runs").children) {
    run.toggleAttribute("aria-current", run.from <= state.at && state.at <= run.to);
  }
}

async function shares() {
  const asked = `${state.place}@${state.at}`;
  const rows = [];
  try {
    const found = await json(`point.json?${query()}&year=${yearAt(state.at)}`);
    if (!state.place || asked !== `${state.place}@${state.at}`) return;
    for (const [key, label] of [["confidence", "Confidence"], ["change_probability", "Probability of change"]]) {
      if (typeof found[key] !== "number") continue;
      const bar = element("meter");
      bar.value = found[key];
      bar.setAttribute("aria-label", label);
      const value = element("dd", `${Math.round(100 * found[key])} %`);
      value.prepend(bar);
      rows.push(element("dt", label), value);
    }
  } catch {
    // the class is there without them
  }
  $("shares").replaceChildren(...rows);
}

// A run is a stretch of years without a change.
function strip() {
  const { codes } = state.series;
  const { years } = state.part;
  const runs = [];
  for (const [i, code] of codes.entries()) {
    if (runs.at(-1)?.code === code) runs.at(-1).to = i;
    else runs.push({ code, from: i, to: i });
  }
  const words = (run) => `${years[run.from]}${run.to > run.from ? `–${years[run.to]}` : ""}`;
  $("strip").replaceChildren(
    ...runs.map((run) => {
      const piece = element("span");
      piece.style.flexGrow = run.to - run.from + 1;
      piece.title = `${words(run)} ${nameOf(run.code)}`;
      paint(piece, classOf(run.code)?.colour);
      return piece;
    }),
    element("b"),
  );
  const changes = runs.length === 1 ? "no change" : runs.length === 2 ? "1 change" : `${runs.length - 1} changes`;
  $("strip").setAttribute("aria-label", `Class in every year from ${years[0]} to ${years.at(-1)}: ${changes}`);
  $("since").textContent = years[0];
  $("until").textContent = years.at(-1);
  $("runs").replaceChildren(
    ...runs.map((run) => {
      const row = element("li");
      row.append(swatch(classOf(run.code)?.colour), element("span", words(run), "span"), element("span", nameOf(run.code)));
      return Object.assign(row, { from: run.from, to: run.to });
    }),
  );
}

// -- scale, address of the view ---------------------------------------------------------------------------------------

function scale() {
  const metres = (40_075_017 * Math.cos((toLat(map.y) * Math.PI) / 180)) / map.size;
  $("scale").hidden = metres > 15_000; // of a map of the world it would be true along one line
  const most = metres * 110;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].find((f) => f * power <= most) * power;
  $("scale").style.width = `${length / metres}px`;
  $("scale").querySelector("span").textContent = length < 1000 ? `${length} m` : `${length / 1000} km`;
}

function remember() {
  clearTimeout(state.writing);
  state.writing = setTimeout(() => {
    const view = { year: yearAt(state.at), lat: toLat(map.y).toFixed(4), lon: toLon(map.x).toFixed(4), zoom: map.zoom.toFixed(2) };
    history.replaceState(null, "", `#${new URLSearchParams({ ...(state.part.name && { part: state.part.name }), ...view })}`);
  }, 250);
}

// A cube that grows shows its new years by itself.
async function renew() {
  if (document.hidden || !state.info) return;
  try {
    const info = await json("info.json");
    if (info.version === state.info.version) return;
    state.info = info;
    const part = info.parts.find((p) => p.name === state.part.name);
    if (part) choose(part, yearAt(state.at));
  } catch {
    // the next one may succeed
  }
}

// -- hands ------------------------------------------------------------------------------------------------------------

$("in").addEventListener("click", () => map.zoomBy(1));
$("out").addEventListener("click", () => map.zoomBy(-1));
$("home").addEventListener("click", () => map.home());
$("play").addEventListener("click", () => play(!state.playing));
$("forget").addEventListener("click", forget);
$("part").addEventListener("change", () => {
  play(false);
  choose(state.info.parts.find((p) => p.name === $("part").value), yearAt(state.at));
});
$("year").addEventListener("input", () => {
  play(false);
  setYear(Number($("year").value));
});
$("strip").addEventListener("click", (event) => {
  const box = $("strip").getBoundingClientRect();
  const share = (event.clientX - box.left) / box.width;
  play(false);
  setYear(Math.min(state.part.years.length - 1, Math.max(0, Math.floor(share * state.part.years.length))));
});
$("map").addEventListener("keydown", (event) => {
  const steps = { ",": -1, ".": 1 };
  if (!state.part || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") play(!state.playing);
  else if (event.key in steps) {
    play(false);
    setYear(state.at + steps[event.key]);
  } else return;
  event.preventDefault();
});
setInterval(renew, 60_000);
start();
