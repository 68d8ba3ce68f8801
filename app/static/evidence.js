// The arithmetic of an answer: every fused logit is the sum of its contribution maps, over stages and cells.
// No DOM here. An image's evidence is
//   {classes: [class index, ...],                 // whose planes are known
//    stages: [{name, height, width, planes: [Float32Array(height * width), ...]}, ...]}   // shallow to deep
// with one plane a class, in the order of `classes`, and last the mean of the maps over all classes of the model.

/** Compared with the mean over all classes: what a softmax sees. */
export const ALL = "all";
/** Compared with nothing: the contributions as they are. */
export const NOTHING = "nothing";

/** Evidence from the field `maps` of an answer: little-endian float32 in base64, (classes + 1, height, width). */
export function decode(maps) {
  const stages = maps.stages.map(({ name, shape: [planes, height, width], values }) => {
    const bytes = Uint8Array.from(atob(values), (character) => character.charCodeAt(0));
    const cells = height * width;
    if (planes !== maps.classes.length + 1 || bytes.length !== 4 * planes * cells) {
      throw new Error(`the maps of ${name} do not have the size that they say.`);
    }
    const view = new DataView(bytes.buffer);
    const plane = (first) =>
      Float32Array.from({ length: cells }, (_, cell) => view.getFloat32(4 * (first + cell), true));
    return { name, height, width, planes: Array.from({ length: planes }, (_, index) => plane(index * cells)) };
  });
  return { classes: maps.classes, stages };
}

/**
 * How much of each cell lies in a box, or outside it: 0 to 1 each.
 *
 * @param stage of the evidence
 * @param box {left, top, right, bottom} as fractions of what the network saw
 * @param inside the parts within the box rather than those outside
 * @returns Float64Array(height * width); inside and outside sum to 1 in every cell
 */
export function covered(stage, box, inside) {
  const overlap = (low, high, index, count) =>
    Math.max(0, Math.min(high * count, index + 1) - Math.max(low * count, index));
  const { height, width } = stage;
  return Float64Array.from({ length: height * width }, (_, cell) => {
    const column = overlap(box.left, box.right, cell % width, width);
    const within = column * overlap(box.top, box.bottom, Math.floor(cell / width), height);
    return inside ? within : 1 - within;
  });
}

/**
 * What of each stage's evidence counts: for each stage its parts by cell, all, or none.
 *
 * @param evidence as `decode` gave it
 * @param off Set of the numbers of stages switched off
 * @param box of which the evidence is left out, or null
 * @param only keep the box alone, and leave out the rest
 */
export function kept(evidence, off, box, only) {
  return evidence.stages.map((stage, number) => {
    if (off.has(number)) return new Float64Array(stage.height * stage.width);
    if (box) return covered(stage, box, only);
    return new Float64Array(stage.height * stage.width).fill(1);
  });
}

/**
 * One stage's map of a class, compared with another, with all classes, or with nothing.
 *
 * @param index of the class
 * @param reference another class' index, ALL or NOTHING
 * @param parts of `kept`, or nothing: all of it
 * @returns Float64Array(height * width); its sum is what the stage adds to the (difference of) fused logits
 */
export function map(evidence, number, index, reference, parts) {
  const { planes } = evidence.stages[number];
  const plane = (label) => planes[evidence.classes.indexOf(label)];
  const other = reference === NOTHING ? null : reference === ALL ? planes.at(-1) : plane(reference);
  return Float64Array.from(plane(index), (own, cell) => (own - (other ? other[cell] : 0)) * (parts ? parts[cell] : 1));
}

/** Sum in float64. */
export const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Each stage's sum of its map: what it adds. */
export function contributions(evidence, index, reference, parts) {
  return evidence.stages.map((_, number) => sum(map(evidence, number, index, reference, parts?.[number])));
}

/** Fused logits of the known classes, of all the evidence or of `parts` of it, as `kept` gives them. */
export function fusedLogits(evidence, parts) {
  return evidence.classes.map((index) => sum(contributions(evidence, index, NOTHING, parts)));
}

/** Confidences of fused logits, by the temperature and the power of the model's card. */
export function confidences(logits, { temperature, power }) {
  const largest = Math.max(...logits);
  const chances = logits.map((logit) => Math.exp(-(((largest - logit) / temperature) ** power)));
  const total = sum(chances);
  return chances.map((chance) => chance / total);
}

/** Each stage's share of the evidence for a class: its absolute evidence over that of all stages. */
export function shares(evidence, index, parts) {
  const absolute = contributions(evidence, index, ALL, parts).map(Math.abs);
  const total = sum(absolute);
  return absolute.map((value) => (total ? value / total : 0));
}

/** A map's values for the whole image's area: their mean is the map's sum, so that fine and coarse maps compare. */
export const density = (values) => values.map((value) => value * values.length);

/**
 * Densities of one map on a finer grid.
 *
 * @param values Float64Array(height * width)
 * @param smooth interpolated between the centres of cells, by which the mean stays the same, rather than cells
 * @returns Float64Array(side * side)
 */
export function enlarge(values, height, width, side, smooth) {
  const along = (count) =>
    Array.from({ length: side }, (_, pixel) => {
      const place = ((pixel + 0.5) * count) / side;
      if (!smooth) return [Math.floor(place), Math.floor(place), 0];
      const inner = Math.min(Math.max(place - 0.5, 0), count - 1);
      const low = Math.floor(inner);
      return [low, Math.min(low + 1, count - 1), inner - low];
    });
  const columns = along(width);
  const rows = along(height);
  const enlarged = new Float64Array(side * side);
  let pixel = 0;
  for (const [upper, lower, down] of rows) {
    for (const [left, right, across] of columns) {
      const above = values[upper * width + left] * (1 - across) + values[upper * width + right] * across;
      const below = values[lower * width + left] * (1 - across) + values[lower * width + right] * across;
      enlarged[pixel++] = above * (1 - down) + below * down;
    }
  }
  return enlarged;
}
