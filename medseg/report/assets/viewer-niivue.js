// NiiVue's view of a case in three dimensions, from the voxels that the viewer has unpacked.

/** Voxels of 8 bits as a NIfTI-1 file. */
function nifti(data, bytes) {
  const file = new Uint8Array(352 + bytes.length);
  const header = new DataView(file.buffer);
  header.setInt32(0, 348, true);
  [3, ...data.shape, 1, 1, 1, 1].forEach((n, i) => header.setInt16(40 + 2 * i, n, true));
  header.setInt16(70, 2, true); // uint8
  header.setInt16(72, 8, true); // bits of it
  [1, ...data.spacing_mm].forEach((mm, i) => header.setFloat32(76 + 4 * i, mm, true));
  header.setFloat32(108, 352, true); // where the voxels begin
  header.setFloat32(112, 1, true); // values are those stored, times 1
  header.setUint8(123, 2); // mm
  header.setInt16(254, 1, true); // the affine leads to the scanner's space
  data.affine.slice(0, 3).flat().forEach((value, i) => header.setFloat32(280 + 4 * i, value, true));
  file.set([0x6e, 0x2b, 0x31, 0], 344); // "n+1"
  file.set(bytes, 352);
  return file.buffer;
}

/** Colours of the labels as NiiVue takes them, with so much white in them. */
function colour_table({ labels }, white) {
  const colours = [[0, 0, 0], ...labels.map(({ colour }) => colour.map((part) => part + (255 - part) * white))];
  const [R, G, B] = [0, 1, 2].map((n) => colours.map((colour) => Math.round(colour[n])));
  return { R, G, B, A: colours.map((_, n) => (n ? 255 : 0)), I: colours.map((_, n) => n) };
}

/** Show NiiVue in `place`; gives a function that shows the masks that are on. `source` holds NiiVue as text. */
async function niivue_view(viewer, place, source) {
  const { data, at, window } = viewer;
  if (!document.createElement("canvas").getContext("webgl2")) throw new Error("this browser has no WebGL2");
  if (!globalThis.niivue) document.head.append(make("script", {}, source.textContent)); // runs it
  const { Niivue, NVImage, SHOW_RENDER, MULTIPLANAR_TYPE } = globalThis.niivue;
  const canvas = make("canvas", { tabindex: 0, role: "application", "aria-label": `3-D view of ${data.case}` });
  const frame = make("div", { class: "viewer-3d-frame" }, canvas);
  place.append(frame);
  // the wheel is the page's until the view is clicked at
  const kept_from = (event) => document.activeElement !== canvas && event.stopPropagation();
  frame.addEventListener("wheel", kept_from, { capture: true, passive: true });
  const view = new Niivue({
    logLevel: "error",
    loadingText: "",
    dragAndDropEnabled: false,
    clipPlaneHotKey: "", // letters are the viewer's
    cycleClipPlaneHotKey: "",
    viewModeHotKey: "",
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    multiplanarLayout: MULTIPLANAR_TYPE.GRID,
    multiplanarShowRender: SHOW_RENDER.ALWAYS,
    heroImageFraction: 0.55,
    crosshairColor: [1, 1, 1, 0.5],
    crosshairWidth: 0.5,
    crosshairWidthUnit: "percent",
  });
  await view.attachToCanvas(canvas);
  const shown = ["image", ...MASKS].filter((part) => data[part]);
  for (const part of shown) {
    const volume = await NVImage.loadFromUrl({ url: nifti(data, data[part]), name: `${part}.nii`, colormap: "gray" });
    if (part !== "image") volume.setColormapLabel(colour_table(data, part === "prediction" ? 0.5 : 0));
    else [volume.cal_min, volume.cal_max] = [-0.5, 0.5].map((half) => window.centre + half * window.width);
    view.addVolume(volume);
  }
  view.scene.crosshairPos = data.shape.map((n, axis) => (at[axis] + 0.5) / n);
  const help =
    "NiiVue; the prediction is paler. Drag: turns the body, moves the crosshair. Wheel, after a click: slices, cuts.";
  place.append(make("p", { class: "viewer-help" }, help));
  let shown_before = null;
  return (on) => {
    const now = MASKS.filter((mask) => on[mask]).join();
    if (now === shown_before) return; // NiiVue makes everything anew
    shown_before = now;
    shown.forEach((part, n) => part !== "image" && view.setOpacity(n, on[part] ? 0.6 : 0));
  };
}
