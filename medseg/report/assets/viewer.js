// The viewer of medseg's reports: a case in three linked planes, with the outlines of reference and prediction.
//
// It mounts itself on every <section class="viewer"> of the page; the element after the section holds the case as JSON
// (medseg/report/viewer.py says what is in it). No library, no WebGL, no request: it works from disk. Where the page
// holds NiiVue, as text that nobody has run yet, a button runs it and shows the same voxels in three dimensions.
//
// A viewer is {data, planes, at, on, window, parts}: the case; the planes that are shown, each with its canvas and
// slider; the voxel under the crosshair; what is switched on; the middle and width of the window, in bytes; and the
// elements that change.

const TALLEST_PX = 640; // of a plane
const PAGE_SCROLLS_MS = 300; // a wheel that scrolls the page goes on doing so when a plane comes under it
const NOTCH_PX = 50;
let page_scrolled = -Infinity;
addEventListener("scroll", () => (page_scrolled = performance.now()), { passive: true });

/** A new element with attributes and children; attributes `on...` are listeners. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value, { passive: false });
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** Bytes of gzip-compressed base64 text; null of null. */
async function unpacked(text) {
  if (text === null) return null;
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// ---- what changes ---------------------------------------------------------------------------------------------------

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** The state to begin with, and to come back to. */
function beginning(data) {
  const [low, high] = data.window.map((value) => to_byte(data, value));
  return {
    at: [...data.start],
    on: { reference: data.reference !== null, prediction: data.prediction !== null, filling: false },
    window: { centre: (low + high) / 2, width: Math.max(1, high - low) },
  };
}

function reset(viewer) {
  Object.assign(viewer, beginning(viewer.data));
  changed(viewer);
}

function move(viewer, axis, to) {
  viewer.at[axis] = clamp(Math.round(to), 0, viewer.data.shape[axis] - 1);
  changed(viewer);
}

function toggle(viewer, which) {
  if (!(which in viewer.parts.buttons)) return;
  viewer.on[which] = !viewer.on[which];
  changed(viewer);
}

function set_window(viewer, centre, width) {
  viewer.window = { centre: clamp(centre, 0, 255), width: clamp(width, 1, 255) };
  changed(viewer);
}

/** Show the state, once before the next picture of the screen. */
function changed(viewer) {
  if (viewer.waiting) return;
  viewer.waiting = true;
  requestAnimationFrame(() => {
    viewer.waiting = false;
    refresh(viewer);
  });
}

function refresh(viewer) {
  const { data, planes, at, on, parts } = viewer;
  for (const plane of planes) {
    draw(viewer, plane);
    if (!plane.slider) continue;
    const text = `${at[plane.axis] + 1} of ${data.shape[plane.axis]}`;
    plane.slider.value = at[plane.axis];
    plane.slider.setAttribute("aria-valuetext", text);
    plane.number.textContent = text;
  }
  for (const [which, button] of Object.entries(parts.buttons)) button.setAttribute("aria-pressed", on[which]);
  if (data.image) say_window(viewer);
  parts.status.textContent = place_in_words(viewer);
  viewer.show_in_3d?.(on);
}

// ---- words ----------------------------------------------------------------------------------------------------------

const to_byte = ({ range: [low, high] }, value) => ((value - low) / (high - low)) * 255;
const to_value = ({ range: [low, high] }, byte) => low + (byte / 255) * (high - low);
const in_words = (value) => String(Number(value.toPrecision(4))).replace("-", "\u2212");

/** Where the crosshair is, and what is there. */
function place_in_words({ data, planes, at }) {
  const voxel = at[0] + data.shape[0] * (at[1] + data.shape[1] * at[2]);
  const said = data.picture
    ? [`Column ${data.shape[0] - at[0]}, row ${data.shape[1] - at[1]}`]
    : [...planes.map(({ name, axis }) => `${name} ${at[axis] + 1} of ${data.shape[axis]}`), world_in_words(data, at)];
  if (data.image) {
    const bytes = Array.from(data.image.subarray(voxel * data.channels, (voxel + 1) * data.channels));
    said.push(`value ${bytes.map((byte) => in_words(to_value(data, byte))).join(", ")}`);
  }
  for (const which of MASKS.filter((mask) => data[mask])) {
    said.push(`${which}: ${data.labels[data[which][voxel] - 1]?.name ?? "background"}`);
  }
  return said.join(" \u00b7 ");
}

function world_in_words({ affine }, at) {
  const place = ["LR", "PA", "IS"].map((ends, n) => {
    const mm = affine[n][0] * at[0] + affine[n][1] * at[1] + affine[n][2] * at[2] + affine[n][3];
    return `${ends[mm < 0 ? 0 : 1]} ${Math.abs(mm).toFixed(1)}`;
  });
  return `${place.join(", ")} mm`;
}

function say_window({ data, window, parts }) {
  const ends = [-0.5, 0.5].map((half) => in_words(to_value(data, window.centre + half * window.width)));
  parts.window.textContent = `Window ${ends.join(" to ")}`;
  parts.brightness.value = 255 - window.centre;
  parts.contrast.value = 256 - window.width;
  for (const slider of [parts.brightness, parts.contrast]) slider.setAttribute("aria-valuetext", ends.join(" to "));
}

const help_of = (planes) =>
  (planes.length < 3
    ? "Click, or arrow keys in the picture: crosshair. "
    : "Wheel, or Page Up and Page Down in a plane: slices. Click, or arrow keys: crosshair. ") +
  "R and P: reference and prediction on and off. F: fill. 0: back to the start. Drag with the right button: window.";

// ---- what the reader does -------------------------------------------------------------------------------------------

function pointed(viewer, { canvas, across, down }, event) {
  const box = canvas.getBoundingClientRect();
  const { shape } = viewer.data;
  move(viewer, across, shape[across] - 1 - Math.floor(((event.clientX - box.left) / box.width) * shape[across]));
  move(viewer, down, shape[down] - 1 - Math.floor(((event.clientY - box.top) / box.height) * shape[down]));
}

function dragged(viewer, plane, event) {
  const { centre, width } = viewer.window;
  if (event.buttons & 2) set_window(viewer, centre - event.movementY, width + event.movementX);
  else if (event.buttons & 1) pointed(viewer, plane, event);
}

function wheeled(viewer, plane, event) {
  const is_pages = document.activeElement !== plane.canvas && performance.now() - page_scrolled < PAGE_SCROLLS_MS;
  if (event.ctrlKey || !plane.slider || is_pages) return;
  event.preventDefault();
  // a notch of a mouse is one slice, however far it is said to go; touchpads send many small steps
  const is_notch = event.deltaMode || Math.abs(event.deltaY) >= NOTCH_PX;
  plane.turned = is_notch ? NOTCH_PX * Math.sign(event.deltaY) : (plane.turned ?? 0) + event.deltaY;
  if (Math.abs(plane.turned) < NOTCH_PX) return;
  move(viewer, plane.axis, viewer.at[plane.axis] - Math.sign(plane.turned));
  plane.turned = 0;
}

const with_others = (event) => event.ctrlKey || event.metaKey || event.altKey; // the browser's keys

function key_in_plane(viewer, { axis, across, down }, event) {
  const { at, data } = viewer;
  const ways = {
    ArrowLeft: [across, at[across] + 1],
    ArrowRight: [across, at[across] - 1],
    ArrowUp: [down, at[down] + 1],
    ArrowDown: [down, at[down] - 1],
    PageUp: [axis, at[axis] + 1],
    PageDown: [axis, at[axis] - 1],
    Home: [axis, 0],
    End: [axis, data.shape[axis] - 1],
  };
  if (!(event.key in ways) || with_others(event)) return;
  event.preventDefault();
  move(viewer, ...ways[event.key]);
}

function key_anywhere(viewer, event) {
  const switched = { r: "reference", p: "prediction", f: "filling" }[event.key.toLowerCase()];
  if (with_others(event)) return;
  if (switched) toggle(viewer, switched);
  if (event.key === "0") reset(viewer);
}

// ---- what the reader sees -------------------------------------------------------------------------------------------

/** Buttons and sliders above the planes. */
function bar_of(viewer) {
  const { data, parts } = viewer;
  const button = (text, onclick) => make("button", { type: "button", onclick }, text);
  const line = (kind) => make("span", { class: `viewer-line ${kind}`, "aria-hidden": "true" });
  parts.buttons = {};
  if (data.reference) parts.buttons.reference = button("Reference", () => toggle(viewer, "reference"));
  if (data.prediction) parts.buttons.prediction = button("Prediction", () => toggle(viewer, "prediction"));
  for (const [which, element] of Object.entries(parts.buttons)) element.prepend(line(which));
  if (data.reference || data.prediction) parts.buttons.filling = button("Fill", () => toggle(viewer, "filling"));
  const bar = make("div", { class: "viewer-bar", role: "group", "aria-label": "What is shown" });
  bar.append(...Object.values(parts.buttons), button("Reset", () => reset(viewer)));
  const source = document.querySelector("script.niivue");
  if (source && !data.picture) {
    bar.append(button("3-D view (NiiVue)", (event) => open_3d(viewer, event.currentTarget, source)));
  }
  if (!data.image) return bar;
  const slider = (oninput) => make("input", { type: "range", min: 0, max: 255, step: "any", oninput });
  parts.brightness = slider(() => set_window(viewer, 255 - parts.brightness.valueAsNumber, viewer.window.width));
  parts.contrast = slider(() => set_window(viewer, viewer.window.centre, 256 - parts.contrast.valueAsNumber));
  parts.window = make("span", { class: "viewer-window" });
  for (const [text, input] of [["Brightness", parts.brightness], ["Contrast", parts.contrast]]) {
    bar.append(make("label", {}, text, input));
  }
  bar.append(parts.window);
  return bar;
}

/** A plane with its slider. All planes of a case have one scale: their width on the page is that in mm. */
function figure_of(viewer, plane, widest_mm, help) {
  const { data } = viewer;
  const [width_mm, height_mm] = [plane.across, plane.down].map((axis) => data.shape[axis] * data.spacing_mm[axis]);
  plane.canvas = make("canvas", {
    tabindex: 0,
    role: "application",
    "aria-label": `${data.picture ? "Picture" : `${plane.name} plane`} of ${data.case}`,
    "aria-describedby": help.id,
    onpointerdown: (event) => {
      plane.canvas.setPointerCapture(event.pointerId);
      if (event.button === 0) pointed(viewer, plane, event);
    },
    onpointermove: (event) => dragged(viewer, plane, event),
    oncontextmenu: (event) => event.preventDefault(),
    onkeydown: (event) => key_in_plane(viewer, plane, event),
    onwheel: (event) => wheeled(viewer, plane, event),
  });
  plane.canvas.style.aspectRatio = `${width_mm} / ${height_mm}`;
  const figure = make("figure", {}, plane.canvas);
  figure.style.flexGrow = width_mm;
  figure.style.setProperty("--part", width_mm / widest_mm);
  if (data.shape[plane.axis] === 1) return figure;
  const oninput = () => move(viewer, plane.axis, plane.slider.valueAsNumber);
  plane.slider = make("input", { type: "range", min: 0, max: data.shape[plane.axis] - 1, oninput });
  plane.number = make("span");
  figure.append(make("label", {}, make("span", {}, `${plane.name} `, plane.number), plane.slider));
  return figure;
}

function planes_of(viewer, help) {
  const { data, planes } = viewer;
  const in_mm = (axis) => data.shape[axis] * data.spacing_mm[axis];
  const widths = planes.map(({ across }) => in_mm(across));
  const tallest = Math.max(...planes.map(({ down }) => in_mm(down)));
  const frame = make("div", { class: "viewer-planes" });
  frame.append(...planes.map((plane) => figure_of(viewer, plane, Math.max(...widths), help)));
  const widest = (TALLEST_PX / tallest) * widths.reduce((sum, width) => sum + width, 0);
  frame.style.setProperty("--widest", `${Math.round(widest)}px`);
  return frame;
}

/** The labels that are there, by colour. */
function legend_of(data) {
  const used = new Set([...(data.reference ?? []), ...(data.prediction ?? [])]);
  const legend = make("ul", { class: "viewer-legend", "aria-label": "Labels" });
  data.labels.forEach(({ name, colour }, n) => {
    if (!used.has(n + 1)) return;
    const swatch = make("span", { class: "viewer-swatch", "aria-hidden": "true" });
    swatch.style.background = css(colour);
    legend.append(make("li", {}, swatch, name));
  });
  return legend;
}

async function open_3d(viewer, button, source) {
  button.disabled = true;
  const place = make("div", { class: "viewer-3d" });
  viewer.parts.status.before(place);
  try {
    viewer.show_in_3d = await niivue_view(viewer, place, source);
    viewer.show_in_3d(viewer.on);
    place.dataset.ready = "";
  } catch (failure) {
    place.replaceChildren(make("p", { role: "alert" }, `The 3-D view cannot be shown: ${failure.message}.`));
  }
}

/** Make each canvas as large as it is on the screen, in the screen's own pixels. */
function fit({ planes }) {
  for (const { canvas } of planes) {
    const box = canvas.getBoundingClientRect();
    const [width, height] = [box.width, box.height].map((px) => Math.max(1, Math.round(px * devicePixelRatio)));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  }
}

// ---- the page -------------------------------------------------------------------------------------------------------

async function mount(section, number) {
  const body = make("div", { class: "viewer-body" });
  section.querySelector(".viewer-body")?.remove(); // of a page that was saved with its viewers in it
  section.append(body);
  try {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser cannot unpack the images (it has no DecompressionStream); a newer one can");
    }
    const data = JSON.parse(section.nextElementSibling.textContent);
    for (const part of ["image", ...MASKS]) data[part] = await unpacked(data[part]);
    show(body, data, number);
  } catch (failure) {
    body.replaceChildren(make("p", { role: "alert" }, `The viewer cannot be shown: ${failure.message}.`));
  }
}

function show(body, data, number) {
  const flat = PLANES.filter(({ axis }) => data.shape[axis] === 1); // of a single slice that slice alone
  const planes = (flat.length ? flat.slice(0, 1) : PLANES).map((plane) => ({ ...plane, cache: new Map() }));
  const viewer = { data, planes, parts: {}, ...beginning(data) };
  const help = make("p", { class: "viewer-help", id: `viewer-help-${number}` }, help_of(planes));
  viewer.parts.status = make("p", { class: "viewer-status", role: "status", "aria-live": "polite" });
  const note = make("p", { class: "viewer-note" }, data.note);
  const frame = planes_of(viewer, help);
  body.append(bar_of(viewer), frame, viewer.parts.status, legend_of(data), note, help);
  body.addEventListener("keydown", (event) => key_anywhere(viewer, event));
  new ResizeObserver(() => {
    fit(viewer);
    changed(viewer);
  }).observe(frame);
}

document.querySelectorAll("section.viewer").forEach(mount);
