// Pictures: maps over the image on canvas, the learned weights as SVG. Signed values have one scale of colours: red
// for, blue against, and nothing at zero; everybody can tell them apart, and strength is linear.

import { density, enlarge } from "./evidence.js";

const FOR = [190, 24, 38]; // as the pictures of POST /explain
const AGAINST = [14, 92, 173];
const STRONGEST = 0.88; // opacity at the limit
const SIDE = 112; // of a map, in pixels; a multiple of the usual numbers of cells, drawn larger by the browser
const LONGEST = 768; // of a picture, in pixels

/** Colour of a value on the scale from -limit to limit, as CSS. */
export function colour(value, limit) {
  return `rgb(${(value < 0 ? AGAINST : FOR).join(" ")} / ${strength(value, limit).toFixed(3)})`;
}

const strength = (value, limit) => (limit ? STRONGEST * Math.min(1, Math.abs(value) / limit) : 0);

/** A file as a picture {colour, grey: canvases, width, height}, upright; null where the browser does not know it. */
export async function openPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const [inColour, grey] = [makeCanvas(width, height), makeCanvas(width, height)];
  const context = inColour.getContext("2d", { willReadFrequently: true }); // it is read once, but at once
  context.fillStyle = "white"; // what the server lays transparency over
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  const picture = { colour: inColour, grey, width: bitmap.width, height: bitmap.height };
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  for (let at = 0; at < data.length; at += 4) {
    // lighter and with less contrast, so that both colours of a map show on it
    const luma = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
    data[at] = data[at + 1] = data[at + 2] = 70 + 0.68 * luma;
  }
  grey.getContext("2d").putImageData(pixels, 0, 0);
  return picture;
}

/**
 * Draw a part of a picture, and layers over it.
 *
 * @param canvas whose size becomes that of the part, `LONGEST` or `longest` pixels on its longer side
 * @param picture or null: plain grey
 * @param area {left, top, right, bottom} of the upright picture, as fractions; what is beyond it stays black
 * @param seen the part of it that the network saw; what is outside is dimmed
 * @param layer a canvas from `layerOf` to lay over what was seen, or null: the picture in its own colours
 */
export function drawPicture(canvas, picture, { area, seen, layer, smooth, longest = LONGEST }) {
  const { width, height } = picture ?? { width: 1, height: 1 };
  const [wide, high] = [(area.right - area.left) * width, (area.bottom - area.top) * height];
  const scale = longest / Math.max(wide, high);
  const size = [Math.max(1, Math.round(wide * scale)), Math.max(1, Math.round(high * scale))];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  const context = canvas.getContext("2d");
  const place = ({ left, top, right, bottom }) => [
    ((left - area.left) / (area.right - area.left)) * size[0],
    ((top - area.top) / (area.bottom - area.top)) * size[1],
    ((right - left) / (area.right - area.left)) * size[0],
    ((bottom - top) / (area.bottom - area.top)) * size[1],
  ];
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "black";
  context.fillRect(0, 0, ...size);
  const whole = place({ left: 0, top: 0, right: 1, bottom: 1 });
  context.imageSmoothingEnabled = width >= 64; // the pixels of a tiny image are shown as they are
  if (picture) {
    context.drawImage(layer ? picture.grey : picture.colour, ...whole);
  } else {
    context.fillStyle = "#9a9a9a";
    context.fillRect(...whole);
  }
  context.fillStyle = "rgb(15 17 21 / 0.72)";
  const within = place(seen);
  context.beginPath();
  context.rect(0, 0, ...size);
  context.rect(...within);
  context.fill("evenodd");
  if (layer) {
    context.imageSmoothingEnabled = smooth;
    context.drawImage(layer, ...within);
  }
}

/**
 * The maps' sum, as colours: a canvas, mostly transparent.
 *
 * @param grids Float64Array(side * side) each, as `gridOf` gives them
 * @param limit value of the strongest colour
 */
export function layerOf(grids, limit) {
  const layer = makeCanvas(SIDE, SIDE);
  const context = layer.getContext("2d");
  const pixels = context.createImageData(SIDE, SIDE);
  const { data } = pixels;
  const values = total(grids);
  for (let pixel = 0; pixel < values.length; pixel++) {
    const hue = values[pixel] < 0 ? AGAINST : FOR;
    data[4 * pixel] = hue[0];
    data[4 * pixel + 1] = hue[1];
    data[4 * pixel + 2] = hue[2];
    data[4 * pixel + 3] = 255 * strength(values[pixel], limit);
  }
  context.putImageData(pixels, 0, 0);
  return layer;
}

/** A stage's map on the grid that all stages are drawn and added on. */
export const gridOf = ({ height, width }, values, smooth) => enlarge(density(values), height, width, SIDE, smooth);

/** Sum of grids. */
export function total(grids) {
  const values = new Float64Array(SIDE * SIDE);
  for (const grid of grids) for (let pixel = 0; pixel < values.length; pixel++) values[pixel] += grid[pixel];
  return values;
}

/** The largest absolute value, to two digits upwards: the limit of a scale. */
export function limitOf(...arrays) {
  let largest = 0;
  for (const values of arrays) for (const value of values) largest = Math.max(largest, Math.abs(value));
  if (!largest) return 1;
  const unit = 10 ** (Math.floor(Math.log10(largest)) - 1);
  return Number((Math.ceil(largest / unit) * unit).toPrecision(2));
}

/**
 * The learned weights: a row a stage, a column a class (one where the classes share them).
 *
 * @param weights the server's answer to model/branch-weights
 * @returns an SVG element with a title and a description
 */
export function drawWeights(weights) {
  const stages = weights.stages;
  const labels = weights.shared_over_classes ? ["all classes"] : Object.keys(stages[0].weights);
  const values = stages.map((stage) => Object.values(stage.weights).slice(0, labels.length));
  const limit = limitOf(...values);
  const high = 34;
  const wide = Math.max(26, Math.min(78, 780 / labels.length));
  const turned = labels.some((label) => 7.2 * label.length > wide);
  const [left, top] = [88, turned ? 84 : 30];
  const right = left + labels.length * wide + 18;
  const width = right + 270;
  const height = top + stages.length * high + 4;
  const numbers = wide >= 40;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "weights" });
  const title = `Learned weights of ${weights.model.name}, method ${weights.method.name}`;
  picture.append(svg("title", {}, title));
  picture.setAttribute("aria-label", title);
  labels.forEach((label, column) => {
    const x = left + (column + 0.5) * wide;
    const attributes = turned
      ? { transform: `translate(${x + 4} ${top - 8}) rotate(-35)` }
      : { x, y: top - 10, "text-anchor": "middle" };
    picture.append(
      svg("text", { ...attributes, class: "label" }, label.length > 14 ? `${label.slice(0, 13)}…` : label),
    );
  });
  picture.append(svg("text", { x: right, y: top - 10, class: "label" }, "importance"));
  picture.append(svg("text", { x: right + 150, y: top - 10, class: "label" }, "accuracy alone"));
  stages.forEach((stage, row) => {
    const y = top + row * high;
    const middle = y + high / 2 + 4;
    picture.append(svg("text", { x: left - 10, y: middle, "text-anchor": "end", class: "label" }, stage.name));
    values[row].forEach((value, column) => {
      const cell = svg("rect", {
        x: left + column * wide + 1,
        y: y + 1,
        width: wide - 2,
        height: high - 2,
        rx: 3,
        fill: colour(value, 1.4 * limit),
      });
      cell.append(svg("title", {}, `${stage.name}, ${labels[column]}: ${value.toFixed(3)}`));
      picture.append(
        svg("rect", {
          x: left + column * wide + 1,
          y: y + 1,
          width: wide - 2,
          height: high - 2,
          rx: 3,
          class: "cell",
        }),
        cell,
      );
      if (numbers) {
        const x = left + (column + 0.5) * wide;
        picture.append(svg("text", { x, y: middle, "text-anchor": "middle", class: "number" }, signed(value)));
      }
    });
    const share = svg("rect", {
      x: right,
      y: y + 9,
      width: Math.max(1, 90 * stage.importance),
      height: high - 18,
      rx: 3,
      class: "importance",
    });
    picture.append(share);
    picture.append(
      svg("text", { x: right + 96, y: middle, class: "number" }, `${(100 * stage.importance).toFixed(0)} %`),
    );
    picture.append(
      svg("text", { x: right + 150, y: middle, class: "number" }, `${(100 * stage.accuracy).toFixed(1)} %`),
    );
  });
  return picture;
}

/** A number with its sign: a true minus, two digits behind the point. */
export function signed(value, digits = 2) {
  const rounded = Math.abs(value).toFixed(digits);
  if (Number(rounded) === 0) return rounded;
  return `${value < 0 ? "−" : "+"}${rounded}`;
}

function makeCanvas(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  return canvas;
}

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
