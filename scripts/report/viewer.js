"use strict";
// The viewers of report.html: three planes through T1 and T2 under outlines, errors and uncertainty.

const CONSTANTS = JSON.parse(document.getElementById("constants").textContent);
const SCALE = 4; // canvas pixels per voxel; an even number keeps lines sharp
const SCANS = ["t1", "t2"]; // of a subject with one contrast, only that
// axes (0 right, 1 front, 2 top) of each plane: across and up the picture, and along the slider's direction;
// mirrored: the picture shows the subject's right on the left
const PLANES = [
  { across: 0, up: 1, along: 2, mirrored: true },
  { across: 0, up: 2, along: 1, mirrored: true },
  { across: 1, up: 2, along: 0, mirrored: false },
];

function rgb(color) {
  return [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
}

// the volume (right, front, top) from a picture with its axial slices side by side
function volume(image, [width, depth, height]) {
  const columns = Math.ceil(Math.sqrt((height * depth) / width));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const values = new Uint8Array(width * depth * height);
  let target = 0;
  for (let z = 0; z < height; z++) {
    const [row, column] = [Math.floor(z / columns), z % columns];
    for (let y = 0; y < depth; y++) {
      let source = 4 * ((row * depth + depth - 1 - y) * canvas.width + column * width);
      for (let x = 0; x < width; x++, source += 4) values[target++] = pixels[source];
    }
  }
  return values;
}

class Viewer {
  constructor(element) {
    this.element = element;
    this.shape = element.dataset.shape.split(",").map(Number);
    this.position = this.shape.map((size, axis) => Math.floor((size * CONSTANTS.position[axis]) / 1000));
    this.wanted = false; // whether the layers should be in memory
    this.layers = null;
    this.scans = SCANS.filter((scan) => element.querySelector(`canvas[data-scan="${scan}"]`));
    this.sliders = [...element.querySelectorAll("input[type=range]")];
    this.checks = Object.fromEntries([...element.querySelectorAll("input[type=checkbox]")].map((c) => [c.name, c]));
    this.canvases = PLANES.map((_, plane) =>
      this.scans.map((scan) => element.querySelector(`canvas[data-plane="${plane}"][data-scan="${scan}"]`))
    );
    PLANES.forEach(({ across, up, along, mirrored }, plane) => {
      const slider = this.sliders[plane];
      slider.max = this.shape[along] - 1;
      slider.value = this.position[along];
      slider.addEventListener("input", () => this.move({ [along]: Number(slider.value) }));
      for (const canvas of this.canvases[plane]) {
        canvas.width = this.shape[across] * SCALE;
        canvas.height = this.shape[up] * SCALE;
        canvas.addEventListener("click", (event) => {
          const x = Math.floor((event.offsetX / canvas.clientWidth) * this.shape[across]);
          const y = Math.floor((event.offsetY / canvas.clientHeight) * this.shape[up]);
          this.move({ [across]: mirrored ? this.shape[across] - 1 - x : x, [up]: this.shape[up] - 1 - y });
        });
      }
    });
    for (const check of Object.values(this.checks)) check.addEventListener("change", () => this.draw());
  }

  async load() {
    this.wanted = true;
    const layers = {};
    for (const image of this.element.querySelectorAll("img[data-layer]")) {
      const name = image.dataset.layer;
      const step = name === "uncertainty" ? CONSTANTS.uncertaintyStep : 1;
      const shape = this.shape.map((size) => Math.ceil(size / step));
      await image.decode();
      if (!this.wanted) return; // unloaded in the meantime
      layers[name] = { step, shape, values: volume(image, shape) };
    }
    this.layers = layers;
    this.draw();
    this.element.classList.add("loaded");
  }

  unload() {
    this.wanted = false;
    this.layers = null;
  }

  async move(to) {
    for (const [axis, index] of Object.entries(to)) {
      this.position[axis] = Math.min(Math.max(index, 0), this.shape[axis] - 1);
    }
    PLANES.forEach(({ along }, plane) => (this.sliders[plane].value = this.position[along]));
    if (this.layers) this.draw();
    else await this.load();
  }

  // a slice as the picture shows it, the top row first
  slice(layer, { across, up, along, mirrored }) {
    const { step, shape, values } = this.layers[layer];
    const strides = [1, shape[0], shape[0] * shape[1]];
    const [width, height] = [this.shape[across], this.shape[up]];
    const slice = new Uint8Array(width * height);
    const at = (axis, index) => Math.floor(index / step) * strides[axis];
    for (let v = 0; v < height; v++) {
      for (let u = 0; u < width; u++) {
        const index = mirrored ? width - 1 - u : u;
        slice[v * width + u] = values[at(across, index) + at(up, height - 1 - v) + at(along, this.position[along])];
      }
    }
    return { values: slice, width, height };
  }

  draw() {
    if (!this.layers) return;
    const isChecked = (name) => name in this.checks && this.checks[name].checked;
    PLANES.forEach((plane, index) => {
      const both = this.slice("labels", plane);
      const label = (shift) => both.values.map((value) => (Math.round(value / CONSTANTS.labelStep) >> shift) & 3);
      const [segmented, truth] = [label(0), label(2)];
      const uncertainty = isChecked("uncertainty") && this.slice("uncertainty", plane).values;
      this.scans.forEach((scan, which) => {
        const canvas = this.canvases[index][which];
        const context = canvas.getContext("2d");
        const grey = this.slice(scan, plane);
        const picture = new ImageData(grey.width, grey.height);
        grey.values.forEach((value, i) => {
          let color = [value, value, value];
          if (uncertainty) {
            const weight = Math.min(uncertainty[i] / CONSTANTS.opaqueUncertainty, 1);
            color = CONSTANTS.uncertainty[uncertainty[i]].map((part) => weight * part + (1 - weight) * value);
          }
          if (isChecked("errors") && segmented[i] !== truth[i]) color = rgb(CONSTANTS.errors);
          picture.data.set([...color, 255], 4 * i);
        });
        const small = new OffscreenCanvas(grey.width, grey.height);
        small.getContext("2d").putImageData(picture, 0, 0);
        context.imageSmoothingEnabled = !isChecked("errors") && !uncertainty;
        context.drawImage(small, 0, 0, canvas.width, canvas.height);
        if (isChecked("segmentation")) this.outline(context, segmented, grey, []);
        if (isChecked("label")) this.outline(context, truth, grey, [SCALE / 2]);
        if (isChecked("position")) this.cross(context, plane, grey);
        context.fillStyle = "white";
        context.font = `${5 * SCALE}px sans-serif`;
        context.fillText(scan.toUpperCase(), SCALE, canvas.height - 2 * SCALE);
        const side = plane.mirrored ? ["R", SCALE] : ["A", canvas.width - 5 * SCALE];
        context.fillText(...side, 6 * SCALE);
      });
    });
  }

  // borders in the colour of the higher label, which is the inner tissue
  outline(context, labels, { width, height }, dashes) {
    const paths = CONSTANTS.tissues.map(() => new Path2D());
    const edge = (one, other, x0, y0, x1, y1) => {
      if (one === other) return;
      const path = paths[Math.max(one, other) - 1];
      path.moveTo(x0 * SCALE, y0 * SCALE);
      path.lineTo(x1 * SCALE, y1 * SCALE);
    };
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const own = labels[y * width + x];
        if (x + 1 < width) edge(own, labels[y * width + x + 1], x + 1, y, x + 1, y + 1);
        if (y + 1 < height) edge(own, labels[(y + 1) * width + x], x, y + 1, x + 1, y + 1);
      }
    }
    context.lineWidth = SCALE / 2;
    context.setLineDash(dashes);
    paths.forEach((path, tissue) => {
      context.strokeStyle = CONSTANTS.tissues[tissue];
      context.stroke(path);
    });
    context.setLineDash([]);
  }

  // lines where the other two planes cut this one
  cross(context, { across, up, mirrored }, { width, height }) {
    const x = (mirrored ? width - 1 - this.position[across] : this.position[across]) + 0.5;
    const y = height - 1 - this.position[up] + 0.5;
    context.fillStyle = "rgba(255, 255, 255, 0.6)";
    context.fillRect(x * SCALE, 0, 1, height * SCALE);
    context.fillRect(0, y * SCALE, width * SCALE, 1);
  }
}

document.documentElement.classList.add("scripted");
const viewers = new Map([...document.querySelectorAll(".viewer")].map((element) => [element, new Viewer(element)]));
// a viewer's layers take memory only while it is near the window
const near = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) viewers.get(target).load();
      else viewers.get(target).unload();
    }
  },
  { rootMargin: "50%" }
);
for (const element of viewers.keys()) near.observe(element);
