// How the viewer draws a slice: image, filled masks, outlines along the edges of voxels, crosshair, letters.
//
// Voxels are in the order R, A, S: index 0 is the patient's left, back and foot. Everything is drawn as radiologists
// have it: the patient's right on the left, the front up or on the left, the head up. So each picture runs against both
// of its voxel axes: its first column, and its first row, is the last voxel.

const PLANES = [
  { name: "Axial", axis: 2, across: 0, down: 1, letters: ["R", "L", "A", "P"] }, // left, right, above, below
  { name: "Coronal", axis: 1, across: 0, down: 2, letters: ["R", "L", "S", "I"] },
  { name: "Sagittal", axis: 0, across: 1, down: 2, letters: ["A", "P", "S", "I"] },
];
const MASKS = ["reference", "prediction"];
const FILLING = 0.35; // opacity
const LINE_PX = 1.6;

/** The slice of a plane: columns, rows, and a function of column and row that gives the index of the voxel. */
function slice_of(data, plane, at) {
  const steps = [1, data.shape[0], data.shape[0] * data.shape[1]];
  const [columns, rows] = [data.shape[plane.across], data.shape[plane.down]];
  const last = at * steps[plane.axis] + (columns - 1) * steps[plane.across] + (rows - 1) * steps[plane.down];
  return [columns, rows, (column, row) => last - column * steps[plane.across] - row * steps[plane.down]];
}

/** A canvas of one pixel a voxel; `paint(pixels, to, voxel)` sets the four bytes of a pixel, from `to` on. */
function painted(data, plane, at, paint) {
  const [columns, rows, voxel] = slice_of(data, plane, at);
  const picture = new ImageData(columns, rows);
  for (let row = 0, to = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, to += 4) paint(picture.data, to, voxel(column, row));
  }
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

/**
 * The outlines of a mask in a slice: pairs of a label and its closed loops, each a list of [column, row, way on].
 * Ways: 0 right, 1 down, 2 left, 3 up. The label lies to the right of the way, so that a line can be drawn just inside
 * of it, and neighbours do not hide each other's.
 */
function outlines(data, mask, plane, at) {
  const [columns, rows, voxel] = slice_of(data, plane, at);
  const label = (c, r) => (c < 0 || r < 0 || c >= columns || r >= rows ? 0 : mask[voxel(c, r)]);
  const edges = new Map(); // label -> Map of corner -> ways of the edges that begin there
  const add = (here, c, r, way) => {
    const corner = r * (columns + 1) + c;
    if (!edges.has(here)) edges.set(here, new Map());
    if (!edges.get(here).has(corner)) edges.get(here).set(corner, []);
    edges.get(here).get(corner).push(way);
  };
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const here = label(c, r);
      if (!here) continue;
      if (label(c, r - 1) !== here) add(here, c, r, 0);
      if (label(c + 1, r) !== here) add(here, c + 1, r, 1);
      if (label(c, r + 1) !== here) add(here, c + 1, r + 1, 2);
      if (label(c - 1, r) !== here) add(here, c, r + 1, 3);
    }
  }
  return Array.from(edges, ([here, from]) => [here, chained(from, columns + 1)]);
}

/** Edges put together to loops; uses `from` up. Where two voxels touch at a corner, each keeps a loop of its own. */
function chained(from, width) {
  const steps = [1, width, -1, -width];
  const loops = [];
  for (const [start, begun] of from) {
    while (begun.length) {
      const loop = [];
      let [corner, way] = [start, begun[0]];
      do {
        const ways = from.get(corner);
        const right = (way + 1) % 4; // a turn to the right stays at the same voxel
        way = ways.splice(loop.length && ways.includes(right) ? ways.indexOf(right) : 0, 1)[0];
        loop.push([corner % width, Math.floor(corner / width), way]);
        corner += steps[way];
      } while (corner !== start || from.get(start).includes((way + 1) % 4));
      loops.push(loop);
    }
  }
  return loops;
}

/** Loops as a path in pixels, `inset` pixels inside of the label; x_px and y_px are the size of a voxel. */
function path_of(loops, x_px, y_px, inset) {
  const inward = [[0, 1], [-1, 0], [0, -1], [1, 0]]; // to the right of each way
  const path = new Path2D();
  for (const loop of loops) {
    loop.forEach(([column, row, way], n) => {
      const before = loop[(n || loop.length) - 1][2];
      const [[x1, y1], [x2, y2]] = [inward[way], before === way ? [0, 0] : inward[before]];
      path[n ? "lineTo" : "moveTo"](column * x_px + (x1 + x2) * inset, row * y_px + (y1 + y2) * inset);
    });
    path.closePath();
  }
  return path;
}

/** What `build` makes, made again only when `key` is another than the last time. */
function cached(plane, what, key, build) {
  const before = plane.cache.get(what);
  if (before?.key === key) return before.value;
  const value = build();
  plane.cache.set(what, { key, value });
  return value;
}

function image_of({ data, at, window }, plane) {
  const slice = at[plane.axis];
  const { image, channels } = data;
  return cached(plane, "image", `${slice} ${window.centre} ${window.width}`, () => {
    const darkest = window.centre - window.width / 2;
    const levels = Uint8ClampedArray.from({ length: 256 }, (_, byte) => ((byte - darkest) / window.width) * 255);
    return painted(data, plane, slice, (pixels, to, voxel) => {
      for (let n = 0; n < 3; n++) pixels[to + n] = levels[image[voxel * channels + (channels === 3 ? n : 0)]];
      pixels[to + 3] = 255;
    });
  });
}

function filling_of({ data, at }, plane, which) {
  const slice = at[plane.axis];
  return cached(plane, `filling of ${which}`, slice, () =>
    painted(data, plane, slice, (pixels, to, voxel) => {
      const label = data.labels[data[which][voxel] - 1];
      if (label) pixels.set([...label.colour, 255 * FILLING], to);
    })
  );
}

/** Draw a plane of a viewer on its canvas, in the pixels of the screen. */
function draw(viewer, plane) {
  const { data, at, on } = viewer;
  const { canvas, across, down } = plane;
  const pen = canvas.getContext("2d");
  const dot = devicePixelRatio;
  const [x_px, y_px] = [canvas.width / data.shape[across], canvas.height / data.shape[down]];
  pen.fillStyle = "black";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = !data.picture;
  if (data.image) pen.drawImage(image_of(viewer, plane), 0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = false;
  for (const which of MASKS.filter((mask) => on[mask])) {
    if (on.filling) pen.drawImage(filling_of(viewer, plane, which), 0, 0, canvas.width, canvas.height);
    const slice = at[plane.axis];
    pen.setLineDash(which === "prediction" ? [5 * dot, 4 * dot] : []);
    for (const [label, loops] of cached(plane, which, slice, () => outlines(data, data[which], plane, slice))) {
      const path = path_of(loops, x_px, y_px, (LINE_PX * dot) / 2);
      // a dark rim, so that the line is seen on bright ground, and dashes on a solid line of the same colour
      stroke(pen, path, `rgb(0 0 0 / ${which === "prediction" ? 0.85 : 0.5})`, 2.2 * LINE_PX * dot);
      stroke(pen, path, css(data.labels[label - 1].colour), LINE_PX * dot);
    }
  }
  pen.setLineDash([]);
  const middle = [across, down].map((axis) => data.shape[axis] - at[axis] - 0.5);
  draw_crosshair(pen, middle[0] * x_px, middle[1] * y_px, dot);
  if (!data.picture) draw_letters(pen, plane.letters, dot);
}

function stroke(pen, path, colour, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.stroke(path);
}

/** Two lines that leave the place itself free. */
function draw_crosshair(pen, x, y, dot) {
  const { width, height } = pen.canvas;
  const gap = 8 * dot;
  const path = new Path2D(`M0 ${y}H${x - gap}M${x + gap} ${y}H${width}M${x} 0V${y - gap}M${x} ${y + gap}V${height}`);
  stroke(pen, path, "rgb(0 0 0 / 0.4)", 2 * dot);
  stroke(pen, path, "rgb(255 255 255 / 0.6)", dot);
}

function draw_letters(pen, [left, right, above, below], dot) {
  const { width, height } = pen.canvas;
  const far = 10 * dot;
  pen.font = `600 ${13 * dot}px system-ui, sans-serif`;
  [pen.textAlign, pen.textBaseline, pen.lineJoin] = ["center", "middle", "round"];
  [pen.strokeStyle, pen.fillStyle, pen.lineWidth] = ["rgb(0 0 0 / 0.8)", "white", 3 * dot];
  for (const [letter, x, y] of [
    [left, far, height / 2],
    [right, width - far, height / 2],
    [above, width / 2, far],
    [below, width / 2, height - far],
  ]) {
    pen.strokeText(letter, x, y);
    pen.fillText(letter, x, y);
  }
  pen.lineJoin = "miter"; // of outlines
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
