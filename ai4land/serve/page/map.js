// A map of class tiles on a canvas: web Mercator, pan and zoom by pointer, wheel and keys. Knows nothing of the page around it.
// Positions are fractions of the world square: x from 180°W, y from the north.

const SIDE = 256;
const KEPT = 256; // tiles in memory
const AT_ONCE = 6; // tiles on the way
const NONE = 255; // a pixel without a class

export const toX = (lon) => (lon + 180) / 360;
export const toY = (lat) => {
  const s = Math.sin((Math.max(-85.0511, Math.min(85.0511, lat)) * Math.PI) / 180);
  return 0.5 - Math.log((1 + s) / (1 - s)) / (4 * Math.PI);
};
export const toLon = (x) => (((x % 1) + 1) % 1) * 360 - 180;
export const toLat = (y) => (Math.atan(Math.sinh(Math.PI * (1 - 2 * y))) * 180) / Math.PI;

export class TileMap {
  // `on` has functions: moved(), pointed(index or null, lon, lat), picked(lon, lat), settled(), failed()
  constructor(canvas, on) {
    this.canvas = canvas;
    this.ink = canvas.getContext("2d");
    this.on = on;
    this.tiles = new Map();
    this.flying = new Map();
    this.x = 0.5;
    this.y = 0.4;
    this.zoom = 1;
    this.part = null;
    this.year = null;
    this.before = null; // the year that is drawn until the tiles of the new one are there
    this.only = null; // index of the one class that stands out
    this.pin = null;
    this.scratch = new OffscreenCanvas(SIDE, SIDE).getContext("2d", { willReadFrequently: true });
    this.still = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.resize()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.listen();
  }

  // -- what is shown --------------------------------------------------------------------------------------------------

  show(part, version, year) {
    this.part = part;
    this.version = version;
    this.year = this.before = year;
    this.global = part.bounds[2] - part.bounds[0] > 359.9;
    this.palette = part.classes.map((c) => parseInt(c.colour.slice(1), 16));
    this.indexOf = new Map(this.palette.map((rgb, i) => [rgb, i]).reverse());
    this.only = null;
    for (const flight of this.flying.values()) flight.abort();
    this.flying.clear();
    this.tiles.clear();
    this.resize();
  }

  setYear(year) {
    if (year === this.year) return;
    if (this.ready(this.year)) this.before = this.year;
    this.year = year;
    this.draw();
  }

  setOnly(index) {
    this.only = index;
    this.draw();
  }

  setPin(place) {
    this.pin = place;
    this.draw();
  }

  home() {
    const [west, south, east, north] = this.part.bounds;
    const [top, bottom] = [toY(Math.min(north, this.global ? 78 : 85)), toY(Math.max(south, this.global ? -58 : -85))];
    const [wide, high] = [toX(east) - toX(west), bottom - top];
    const room = this.global ? 1 : 0.92;
    const fit = Math.min((this.width * room) / wide, (this.height * room) / high);
    this.go((toX(west) + toX(east)) / 2, (top + bottom) / 2, Math.log2(fit / SIDE));
  }

  limits() {
    const sharp = Math.log2(this.ratio);
    const [west, , east] = this.part.bounds;
    const all = Math.log2((Math.min(this.width, this.height) * 0.8) / SIDE / (this.global ? 1 : Math.max(toX(east) - toX(west), 1e-6)));
    const first = this.part.zooms[0] > 0 ? this.part.zooms[0] - sharp - 0.4 : -1;
    return [Math.max(Math.min(all, 6), first, -1), this.part.zooms[1] + 3 - sharp];
  }

  go(x, y, zoom) {
    const [least, most] = this.limits();
    this.zoom = Math.max(least, Math.min(most, zoom));
    this.x = this.global ? ((x % 1) + 1) % 1 : Math.max(0, Math.min(1, x));
    const half = this.height / 2 / this.size;
    this.y = half >= 0.5 ? 0.5 : Math.max(half, Math.min(1 - half, y));
    this.draw();
    this.on.moved();
  }

  get size() {
    return SIDE * 2 ** this.zoom; // of the world, in CSS pixels
  }

  zoomBy(steps, px = this.width / 2, py = this.height / 2, smooth = true) {
    cancelAnimationFrame(this.gliding);
    const from = this.zoom;
    const [least, most] = this.limits();
    const to = Math.max(least, Math.min(most, from + steps));
    const [ax, ay] = this.place(px, py);
    const step = (zoom) => {
      const size = SIDE * 2 ** zoom;
      this.go(ax - (px - this.width / 2) / size, ay - (py - this.height / 2) / size, zoom);
    };
    if (!smooth || this.still.matches) return step(to);
    const begin = performance.now();
    const glide = (now) => {
      const t = Math.min(1, Math.max(0, now - begin) / 180);
      step(from + (to - from) * (1 - (1 - t) ** 3));
      if (t < 1) this.gliding = requestAnimationFrame(glide);
    };
    this.gliding = requestAnimationFrame(glide);
  }

  panBy(px, py) {
    this.go(this.x + px / this.size, this.y + py / this.size, this.zoom);
  }

  place(px, py) {
    return [this.x + (px - this.width / 2) / this.size, this.y + (py - this.height / 2) / this.size];
  }

  // -- tiles ----------------------------------------------------------------------------------------------------------

  level() {
    const [first, last] = this.part.zooms;
    return Math.max(first, Math.min(last, Math.round(this.zoom + Math.log2(this.ratio))));
  }

  wanted() {
    const z = this.level();
    const n = 2 ** z;
    const [half, tall] = [this.width / 2 / this.size, this.height / 2 / this.size];
    const found = [];
    const [west, south, east, north] = this.part.bounds;
    for (let row = Math.max(0, Math.floor((this.y - tall) * n)); row <= Math.min(n - 1, Math.floor((this.y + tall) * n)); row++) {
      if (toY(south) * n < row || toY(north) * n > row + 1) continue;
      for (let col = Math.floor((this.x - half) * n); col <= Math.floor((this.x + half) * n); col++) {
        const x = ((col % n) + n) % n;
        if (!this.global && (col !== x || toX(east) * n < col || toX(west) * n > col + 1)) continue;
        found.push({ z, x, y: row, col, far: Math.hypot((col + 0.5) / n - this.x, (row + 0.5) / n - this.y) });
      }
    }
    return found.sort((a, b) => a.far - b.far);
  }

  key(year, z, x, y) {
    return `${year}/${z}/${x}/${y}`;
  }

  ready(year) {
    return this.wanted().every((t) => this.tiles.has(this.key(year, t.z, t.x, t.y)));
  }

  ask(year, list) {
    for (const t of list) {
      const key = this.key(year, t.z, t.x, t.y);
      if (this.flying.size >= AT_ONCE) return;
      if (!this.tiles.has(key) && !this.flying.has(key)) this.fetch(key);
    }
  }

  async fetch(key) {
    const stop = new AbortController();
    this.flying.set(key, stop);
    let tile;
    try {
      const name = this.part.name ? `part=${encodeURIComponent(this.part.name)}&` : "";
      const answer = await fetch(`tiles/${key}.png?${name}v=${this.version}`, { signal: stop.signal });
      if (!answer.ok) throw new Error(answer.status);
      const bitmap = await createImageBitmap(await answer.blob(), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
      tile = { codes: this.read(bitmap) };
      bitmap.close();
    } catch (error) {
      if (error.name === "AbortError") return;
      tile = { codes: null }; // not asked for again until it leaves the memory
      setTimeout(() => this.tiles.get(key) === tile && this.tiles.delete(key), 5000);
      this.on.failed();
    }
    if (this.flying.get(key) !== stop) return;
    this.flying.delete(key);
    this.tiles.set(key, tile);
    while (this.tiles.size > KEPT) this.tiles.delete(this.tiles.keys().next().value);
    this.draw();
  }

  read(bitmap) {
    this.scratch.clearRect(0, 0, SIDE, SIDE);
    this.scratch.drawImage(bitmap, 0, 0);
    const pixels = this.scratch.getImageData(0, 0, SIDE, SIDE).data;
    const codes = new Uint8Array(SIDE * SIDE).fill(NONE);
    for (let i = 0, p = 0; i < codes.length; i++, p += 4) {
      if (pixels[p + 3]) codes[i] = this.indexOf.get((pixels[p] << 16) | (pixels[p + 1] << 8) | pixels[p + 2]) ?? NONE;
    }
    return codes;
  }

  picture(tile) {
    if (tile.picture && tile.only === this.only) return tile.picture;
    tile.picture ??= new OffscreenCanvas(SIDE, SIDE);
    tile.only = this.only;
    const ink = tile.picture.getContext("2d");
    const image = ink.createImageData(SIDE, SIDE);
    const pixels = image.data;
    for (let i = 0, p = 0; i < tile.codes.length; i++, p += 4) {
      const k = tile.codes[i];
      if (k === NONE) continue;
      const rgb = this.palette[k];
      pixels[p] = rgb >> 16;
      pixels[p + 1] = (rgb >> 8) & 255;
      pixels[p + 2] = rgb & 255;
      pixels[p + 3] = this.only === null || this.only === k ? 255 : 36;
    }
    ink.putImageData(image, 0, 0);
    return tile.picture;
  }

  classAt(px, py) {
    const [x, y] = this.place(px, py);
    const z = this.level();
    const n = 2 ** z;
    const [fx, fy] = [(((x % 1) + 1) % 1) * n, y * n];
    const codes = this.tiles.get(this.key(this.year, z, Math.floor(fx), Math.floor(fy)))?.codes;
    const k = codes?.[Math.floor((fy % 1) * SIDE) * SIDE + Math.floor((fx % 1) * SIDE)];
    return k === undefined || k === NONE ? null : k;
  }

  // -- drawing --------------------------------------------------------------------------------------------------------

  resize() {
    const first = !this.width;
    this.ratio = Math.min(3, window.devicePixelRatio || 1);
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = Math.round(this.width * this.ratio);
    this.canvas.height = Math.round(this.height * this.ratio);
    if (!this.part) this.width = 0;
    else if (first) this.home();
    else this.go(this.x, this.y, this.zoom);
  }

  draw() {
    if (!this.due && this.part) this.due = requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.due = 0;
    const { ink } = this;
    const style = getComputedStyle(this.canvas);
    ink.setTransform(1, 0, 0, 1, 0, 0);
    ink.fillStyle = style.getPropertyValue("--beyond");
    ink.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.paintSea(style.getPropertyValue("--sea"));
    const list = this.wanted();
    const now = new Set(list.map((t) => this.key(this.year, t.z, t.x, t.y)));
    for (const [key, flight] of this.flying) {
      if (!now.has(key) && !this.coming?.has(key)) {
        flight.abort();
        this.flying.delete(key);
      }
    }
    for (const t of list) this.paintTile(t);
    this.paintGrid(style.getPropertyValue("--grid"), style.getPropertyValue("--ink"));
    if (this.pin) this.paintPin(style);
    this.ask(this.year, list);
    const whole = list.every((t) => this.tiles.has(this.key(this.year, t.z, t.x, t.y)));
    if (whole) {
      this.before = this.year;
      if (this.next !== undefined) this.ask(this.next, list);
      this.on.settled();
    }
    this.canvas.dataset.year = whole ? this.year : ""; // what is on the screen, for those who wait for it
  }

  prefetch(year) {
    this.next = year;
    this.coming = year === undefined ? null : new Set(this.wanted().map((t) => this.key(year, t.z, t.x, t.y)));
    if (year !== undefined) this.draw();
  }

  pixel(x, y) {
    const size = this.size * this.ratio;
    return [Math.round(this.canvas.width / 2 + (x - this.x) * size), Math.round(this.canvas.height / 2 + (y - this.y) * size)];
  }

  paintSea(colour) {
    const [west, south, east, north] = this.part.bounds;
    const [left, top] = this.pixel(toX(west), this.global ? 0 : toY(north));
    const [right, bottom] = this.pixel(toX(east), this.global ? 1 : toY(south));
    this.ink.fillStyle = colour;
    if (this.global) this.ink.fillRect(0, top, this.canvas.width, bottom - top);
    else this.ink.fillRect(left, top, right - left, bottom - top);
  }

  paintTile({ z, x, y, col }) {
    const n = 2 ** z;
    const [left, top] = this.pixel(col / n, y / n);
    const [right, bottom] = this.pixel((col + 1) / n, (y + 1) / n);
    const to = [left, top, right - left, bottom - top];
    this.ink.imageSmoothingEnabled = right - left < SIDE;
    for (const year of this.before === this.year ? [this.year] : [this.year, this.before]) {
      const key = this.key(year, z, x, y);
      const tile = this.tiles.get(key);
      if (tile?.codes) {
        this.tiles.delete(key); // to the end of those that are forgotten
        this.tiles.set(key, tile);
        this.ink.drawImage(this.picture(tile), ...to);
        return;
      }
    }
    for (const year of [this.year, this.before]) {
      for (let up = 1; up <= Math.min(6, z); up++) {
        const tile = this.tiles.get(this.key(year, z - up, x >> up, y >> up));
        if (!tile?.codes) continue;
        const part = SIDE >> up;
        const [sx, sy] = [(x & ((1 << up) - 1)) * part, (y & ((1 << up) - 1)) * part];
        this.ink.imageSmoothingEnabled = false;
        this.ink.drawImage(this.picture(tile), sx, sy, part, part, ...to);
        return;
      }
      for (let i = 0; i < 4; i++) {
        const tile = this.tiles.get(this.key(year, z + 1, 2 * x + (i & 1), 2 * y + (i >> 1)));
        if (!tile?.codes) continue;
        const [w, h] = [to[2] / 2, to[3] / 2];
        this.ink.drawImage(this.picture(tile), left + (i & 1) * w, top + (i >> 1) * h, w, h);
      }
    }
  }

  paintGrid(colour, text) {
    const { ink, ratio } = this;
    const degrees = [60, 30, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01].find((d) => (d / 360) * this.size < 220) ?? 0.01;
    const places = Math.max(0, Math.ceil(-Math.log10(degrees) - 1e-9));
    ink.lineWidth = 1;
    ink.strokeStyle = colour;
    ink.fillStyle = text;
    ink.font = `${Math.round(10.5 * ratio)}px system-ui, sans-serif`;
    ink.lineJoin = "round";
    const halo = getComputedStyle(this.canvas).getPropertyValue("--paper");
    const labels = [];
    const name = (v, signs) => (Math.abs(v) < 1e-9 ? "0°" : `${Math.abs(v).toFixed(places)}°${signs[v > 0 ? 1 : 0]}`);
    const half = this.width / 2 / this.size;
    const tall = this.height / 2 / this.size;
    const [west, east] = [(this.x - half) * 360 - 180, (this.x + half) * 360 - 180];
    ink.beginPath();
    ink.textBaseline = "alphabetic";
    ink.textAlign = "left";
    for (let lon = Math.ceil(west / degrees) * degrees; lon <= east; lon += degrees) {
      if (!this.global && Math.abs(lon) > 180 + 1e-9) continue;
      const [px] = this.pixel(lon / 360 + 0.5, 0);
      ink.moveTo(px + 0.5, 0);
      ink.lineTo(px + 0.5, this.canvas.height);
      const turned = ((((lon + 180) % 360) + 360) % 360) - 180;
      labels.push([name(turned, "WE"), px + 4 * ratio, 15 * ratio]);
    }
    const [south, north] = [toLat(Math.min(1, this.y + tall)), toLat(Math.max(0, this.y - tall))];
    for (let lat = Math.ceil(south / degrees) * degrees; lat <= north; lat += degrees) {
      const [, py] = this.pixel(0, toY(lat));
      ink.moveTo(0, py + 0.5);
      ink.lineTo(this.canvas.width, py + 0.5);
      if (py > 30 * ratio) labels.push([name(lat, "SN"), 6 * ratio, py - 4 * ratio]);
    }
    ink.stroke();
    ink.lineWidth = 2.5 * ratio;
    ink.strokeStyle = halo;
    for (const label of labels) ink.strokeText(...label);
    for (const label of labels) ink.fillText(...label);
  }

  paintPin(style) {
    const { ink, ratio } = this;
    const n = Math.round(this.x - toX(this.pin[0]));
    const [px, py] = this.pixel(toX(this.pin[0]) + (this.global ? n : 0), toY(this.pin[1]));
    for (const [colour, width] of [[style.getPropertyValue("--paper"), 5], [style.getPropertyValue("--ink"), 2]]) {
      ink.strokeStyle = colour;
      ink.lineWidth = width * ratio;
      ink.beginPath();
      ink.arc(px, py, 7 * ratio, 0, 2 * Math.PI);
      ink.stroke();
    }
  }

  // -- hands ----------------------------------------------------------------------------------------------------------

  listen() {
    const { canvas } = this;
    const fingers = new Map();
    let start = null;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const pinch = () => {
      const [[ax, ay], [bx, by]] = [...fingers.values()];
      return { gap: Math.hypot(ax - bx, ay - by), x: (ax + bx) / 2, y: (ay + by) / 2 };
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.part || event.button) return;
      cancelAnimationFrame(this.gliding);
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, at(event));
      start = fingers.size === 1 ? { at: at(event), time: event.timeStamp, moved: false } : null;
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.part) return;
      const [px, py] = at(event);
      if (!fingers.has(event.pointerId)) return this.point(px, py);
      if (fingers.size === 1) {
        const [ox, oy] = fingers.get(event.pointerId);
        if (start && Math.hypot(px - start.at[0], py - start.at[1]) > 5) start.moved = true;
        if (!start || start.moved) this.panBy(ox - px, oy - py);
        if (!start || start.moved) fingers.set(event.pointerId, [px, py]);
        return;
      }
      if (fingers.size !== 2) return;
      const a = pinch();
      fingers.set(event.pointerId, [px, py]);
      const b = pinch();
      this.panBy(a.x - b.x, a.y - b.y);
      this.zoomBy(Math.log2(b.gap / Math.max(1, a.gap)), b.x, b.y, false);
    });
    const up = (event) => {
      if (!fingers.delete(event.pointerId)) return;
      if (event.type === "pointerup" && start && !start.moved && event.timeStamp - start.time < 700) {
        const [x, y] = this.place(...start.at);
        if (y >= 0 && y <= 1) this.on.picked(toLon(x), toLat(y));
      }
      start = null;
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => this.on.pointed(undefined));
    canvas.addEventListener("dblclick", (event) => this.part && this.zoomBy(1, ...at(event)));
    canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        if (!this.part) return;
        const amount = event.deltaY * (event.deltaMode === 1 ? 30 : 1);
        this.zoomBy(Math.max(-1, Math.min(1, -amount / 240)), ...at(event), false);
        this.point(...at(event));
      },
      { passive: false },
    );
    const keys = {
      ArrowLeft: () => this.panBy(-80, 0),
      ArrowRight: () => this.panBy(80, 0),
      ArrowUp: () => this.panBy(0, -80),
      ArrowDown: () => this.panBy(0, 80),
      "+": () => this.zoomBy(1),
      "=": () => this.zoomBy(1),
      "-": () => this.zoomBy(-1),
      0: () => this.home(),
      Home: () => this.home(),
      Enter: () => this.on.picked(toLon(this.x), toLat(this.y)),
    };
    canvas.addEventListener("keydown", (event) => {
      if (!this.part || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
  }

  point(px, py) {
    const [x, y] = this.place(px, py);
    if (y < 0 || y > 1) return this.on.pointed(undefined);
    this.on.pointed(this.classAt(px, py), toLon(x), toLat(y));
  }
}
