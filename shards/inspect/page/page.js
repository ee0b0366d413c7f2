"use strict";
// Text of the dataset is shown by textContent only, so that no markup in it is ever parsed.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const classes = new Map(data.classes.map((one) => [one.id, one]));
  const FIRST_CLASSES = 20;
  const $ = (id) => document.getElementById(id);
  const body = (id) => $(id).querySelector("tbody");
  const number = (value) => value.toLocaleString("en");
  const several = (count, one) => `${number(count)} ${one}${count === 1 ? "" : "s"}`;
  const percent = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)} %` : "–");
  const nameOf = (id) => (classes.has(id) ? classes.get(id).name : `class ${id}`);
  const colourOf = (id) => (classes.has(id) ? classes.get(id).colour : "#ffffff");

  function make(tag, options = {}, ...children) {
    const element = document.createElement(tag);
    const { text, ...attributes } = options;
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  function draw(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const ofInstance = (place) => data.colours[place % data.colours.length];
  function swatch(colour) {
    const element = make("i", { class: "swatch", "aria-hidden": "true" });
    element.style.background = colour;
    return element;
  }
  function link(text, address) {
    let url = null;
    try { url = new URL(address); } catch { /* not a URL: shown as text */ }
    if (!url || !["http:", "https:"].includes(url.protocol)) return make("span", { class: "data", text: text || address });
    return make("a", { class: "data", href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", text: text || address });
  }
  const named = (colour, text) => make("span", { class: "named" }, swatch(colour), make("span", { class: "data", text }));
  // Each name has its own element, so that a direction mark in it does not affect the text around it.
  const listed = (texts) => texts.flatMap((text, place) => [...(place ? [", "] : []), make("bdi", { text })]);
  const term = (name, ...values) => [make("dt", { text: name }), make("dd", {}, ...values)];

  // The counts ------------------------------------------------------------------------------------------------------
  const boxOnly = (row) => Math.max(row.boxes - row.groups - row.masks - row.predicted, 0);
  const hasPredicted = data.all.some((row) => row.predicted);
  const sum = (rows, value) => rows.reduce((total, row) => total + value(row), 0);

  function showFacts() {
    $("root").textContent = data.root;
    $("plan").textContent = data.plan.slice(0, 16) || "unknown";
    const objects = sum(data.all, (row) => row.boxes - row.groups);
    const facts = [
      ["images", number(sum(data.splits, (split) => split.images))],
      ["classes", number(data.classes.length)],
      ["annotations", number(sum(data.all, (row) => row.boxes))],
      ["masks", number(sum(data.all, (row) => row.masks))],
      ...(hasPredicted ? [["predicted masks", number(sum(data.all, (row) => row.predicted))]] : []),
      ["of objects have a box only", percent(sum(data.all, boxOnly), objects)],
    ];
    for (const [name, value] of facts) $("facts").append(make("div", {}, make("dt", { text: name }), make("dd", { text: value })));
    const span = ([least, , most]) => (least === most ? number(least) : `${number(least)} – ${number(most)}`);
    for (const split of data.splits) {
      const { sizes } = split;
      const cells = [number(split.images), number(split.shards), (split.nbytes / 1e6).toFixed(1)];
      if (sizes) cells.push(`${sizes.width[1]} × ${sizes.height[1]}`, span(sizes.width), span(sizes.height), percent(sizes.portrait, 1));
      const row = make("tr", {}, make("th", { scope: "row", text: split.split }));
      for (const cell of cells) row.append(make("td", { text: cell }));
      body("splits").append(row);
    }
  }

  let counted = "all";
  let allClasses = false;

  function showClasses() {
    const split = data.splits.find((one) => one.split === counted);
    const counts = (split ? [split] : data.splits).filter((one) => one.labels);
    const images = sum(counts, (one) => one.images);
    // The images whose annotations were read represent all images of their split.
    const verified = (id, kind) => sum(counts, (one) => ((one.labels.classes[id] || {})[kind] || 0) * (one.images / one.labels.images));
    const rows = (split ? split.classes : data.all).filter((row) => row.images).sort((a, b) => b.boxes - a.boxes || a.id - b.id);
    const most = Math.max(1, ...rows.map((row) => row.boxes));
    const shown = allClasses ? rows : rows.slice(0, FIRST_CLASSES);
    body("classes").replaceChildren(...shown.map((row) => {
      const bars = make("div", { class: "bars", role: "img", "aria-label": [`${row.masks} with a mask`, ...(hasPredicted ? [`${row.predicted} with a predicted mask`] : []), `${boxOnly(row)} with a box only`, `${row.groups} group-of`].join(", ") });
      for (const [kind, value] of [["masked", row.masks], ["predicted", row.predicted], ["boxed", boxOnly(row)], ["group", row.groups]]) {
        if (!value) continue;
        const part = make("i", { class: kind });
        part.style.width = `${(100 * value) / most}%`;
        bars.append(part);
      }
      const shares = ["present", "absent"].map((kind) => percent(verified(row.id, kind), images));
      const cells = [number(row.images), number(row.boxes), number(row.masks), ...(hasPredicted ? [number(row.predicted)] : []), percent(boxOnly(row), row.boxes - row.groups), number(row.groups), ...shares];
      const name = make("th", { scope: "row" }, named(colourOf(row.id), row.name));
      return make("tr", {}, name, make("td", {}, bars), ...cells.map((text) => make("td", { text })));
    }));
    $("more").hidden = rows.length <= FIRST_CLASSES;
    $("more").textContent = allClasses ? `Show the ${FIRST_CLASSES} most frequent` : `Show all ${rows.length} classes`;
    const missing = data.classes.length - rows.length;
    const where = split ? `${split.split}: ${several(split.images, "image")}` : `all splits: ${several(sum(data.splits, (one) => one.images), "image")}`;
    $("split-facts").textContent = where + (missing ? `; ${missing} more of the classes in none of them` : "");
    const read = sum(counts, (one) => one.labels.images);
    const of = read === images ? "all images" : `the images, estimated from a random ${number(read)} of ${number(images)}`;
    $("label-note").textContent = counts.length ? `Verified labels: share of ${of}. In all others the class is unknown, not absent.` : "Verified labels were not counted (--label-images 0).";
  }

  function showTabs() {
    for (const name of ["all", ...data.splits.map((split) => split.split)]) {
      const tab = make("button", { type: "button", "aria-pressed": String(name === counted), text: name === "all" ? "All splits" : name });
      tab.addEventListener("click", () => {
        counted = name;
        for (const other of $("tabs").children) other.setAttribute("aria-pressed", String(other === tab));
        showClasses();
      });
      $("tabs").append(tab);
    }
    $("more").addEventListener("click", () => { allClasses = !allClasses; showClasses(); });
  }

  // Pictures --------------------------------------------------------------------------------------------------------
  const groupFlag = data.flags.indexOf("group-of");

  function overlay(sample, { byInstance = false, names = false } = {}) {
    const [width, height] = sample.size;
    const letter = Math.max(width, height) / 45;
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    // Large objects first, so that small ones in front of them stay visible.
    const order = sample.objects.map((_, place) => place).sort((a, b) => area(sample.objects[b]) - area(sample.objects[a]));
    for (const place of order) {
      const object = sample.objects[place];
      const colour = byInstance ? ofInstance(place) : colourOf(object.class);
      const [x, y, w, h] = object.box;
      const isGroup = object.flags.includes(groupFlag);
      const shape = draw("g", { class: "shape", "data-place": place });
      if (object.outline) shape.append(draw("path", { class: object.prediction ? "area predicted" : "area", d: object.outline, fill: colour, stroke: colour, "fill-rule": "evenodd" }));
      if (isGroup) shape.append(draw("rect", { class: "hatch", x, y, width: w, height: h, fill: `url(#${hatchOf(colour)})` }));
      shape.append(draw("rect", { class: (object.outline && !object.prediction) || isGroup ? "box" : "box dashed", x, y, width: w, height: h, stroke: colour }));
      if (object.prediction) shape.append(draw("title", {}, `${nameOf(object.class)}: ${predicted(object)}`));
      if (names) shape.append(draw("text", { class: "name", x: x + letter / 4, y: Math.max(y - letter / 3, letter), "font-size": letter }, [nameOf(object.class), predicted(object)].filter(Boolean).join(" ")));
      svg.append(shape);
    }
    return svg;
  }
  const predicted = (object) => (object.prediction ? `predicted ${object.prediction.score.toFixed(2)}` : "");
  const area = (object) => object.box[2] * object.box[3];

  const hatchOf = (colour) => `hatch-${colour.slice(1)}`;

  function makePatterns() {
    for (const colour of new Set([...data.classes.map((one) => one.colour), ...data.colours])) {
      const at = { id: hatchOf(colour), width: 9, height: 9, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
      $("patterns").querySelector("defs").append(draw("pattern", at, draw("rect", { width: 2.5, height: 9, fill: colour })));
    }
  }

  const ratioOf = (sample) => sample.size[0] / sample.size[1];

  function fillFrame(frame, sample, ratio, photo, options) {
    frame.style.setProperty("--ratio", ratio);
    frame.replaceChildren(overlay(sample, options));
    if (photo) frame.prepend(make("img", { src: sample.picture, alt: describe(sample) }));
  }

  function holds(sample) {
    const counts = new Map();
    for (const object of sample.objects) counts.set(object.class, (counts.get(object.class) || 0) + 1);
    const names = [...counts].map(([id, count]) => (count > 1 ? `${count} × ${nameOf(id)}` : nameOf(id)));
    return names.length ? names : ["no annotations"];
  }
  const describe = (sample) => holds(sample).join(", ");

  // The gallery -----------------------------------------------------------------------------------------------------
  const cards = data.samples.map((sample, place) => {
    const frame = make("span", { class: "frame" });
    const ratio = Math.min(Math.max(ratioOf(sample), 0.6), 2.4); // limits the height and width of extreme formats
    fillFrame(frame, sample, ratio, true);
    const caption = make("span", { class: "caption" }, make("span", { class: "data" }, ...listed(holds(sample))), make("span", { class: "split", text: sample.split }));
    const button = make("button", { type: "button", class: "card", "aria-label": `${sample.id}, ${sample.split}: ${describe(sample)}`, "aria-haspopup": "dialog" }, frame, caption);
    button.addEventListener("click", () => open(place));
    const item = make("li", {}, button);
    item.style.setProperty("--ratio", ratio);
    return { item, button };
  });
  let visible = [];

  const FLAGS = [
    ["any annotations", () => true],
    ["a mask", (sample, own) => own.some((object) => object.outline && !object.prediction)],
    ...(hasPredicted ? [["a predicted mask", (sample, own) => own.some((object) => object.prediction)]] : []),
    ["a box only", (sample, own) => own.some((object) => !object.outline && !object.flags.includes(groupFlag))],
    ...data.flags.map((name, place) => [name, (sample, own) => own.some((object) => object.flags.includes(place))]),
    ["no annotations", (sample) => !sample.objects.length],
    ["a class verified absent", (sample, own, id) => (id ? sample.absent.includes(id) : sample.absent.length > 0)],
    ["a rotation", (sample) => sample.rotation !== 0],
  ];

  function makeFilters() {
    const option = (value, text) => make("option", { value, text });
    const having = (id) => data.samples.filter((sample) => sample.objects.some((object) => object.class === id)).length;
    const byName = [...data.classes].sort((a, b) => a.name.localeCompare(b.name, "en"));
    $("by-class").append(option("", `all (${data.samples.length})`));
    for (const one of byName) if (having(one.id)) $("by-class").append(option(one.id, `${one.name} (${having(one.id)})`));
    $("by-split").append(option("", "all"), ...data.splits.map((split) => option(split.split, split.split)));
    $("by-flag").append(...FLAGS.map(([text], place) => option(place, text)));
    $("filters").addEventListener("change", filter);
    $("filters").addEventListener("submit", (event) => event.preventDefault());
  }

  function filter() {
    const id = Number($("by-class").value);
    const split = $("by-split").value;
    const [name, test] = FLAGS[Number($("by-flag").value)];
    visible = data.samples.flatMap((sample, place) => {
      const own = id ? sample.objects.filter((object) => object.class === id) : sample.objects;
      const hasClass = !id || own.length > 0 || name === "a class verified absent";
      return (!split || sample.split === split) && hasClass && test(sample, own, id) ? [place] : [];
    });
    $("gallery").replaceChildren(...visible.map((place) => cards[place].item));
    $("shown").textContent = `${visible.length} of ${cards.length} shown`;
    $("nothing").hidden = visible.length > 0;
  }

  function makeToggles() {
    for (const place of document.querySelectorAll(".toggles")) {
      for (const kind of ["masks", "boxes"]) {
        const button = make("button", { type: "button", "aria-pressed": "true", "data-kind": kind, text: kind === "masks" ? "Masks" : "Boxes" });
        button.addEventListener("click", () => toggle(kind));
        place.append(button);
      }
    }
  }
  function toggle(kind) {
    const hidden = document.body.classList.toggle(`hide-${kind}`);
    for (const button of document.querySelectorAll(`[data-kind=${kind}]`)) button.setAttribute("aria-pressed", String(!hidden));
  }

  // One sample ------------------------------------------------------------------------------------------------------
  let current = -1;

  function open(place) {
    current = place;
    const sample = data.samples[place];
    const at = visible.indexOf(place);
    $("detail-title").textContent = sample.id;
    $("position").textContent = `${at + 1} of ${visible.length}`;
    $("previous").disabled = at <= 0;
    $("next").disabled = at >= visible.length - 1;
    fillFrame($("photo"), sample, ratioOf(sample), true, { names: true });
    showMasks();
    $("about").replaceChildren(...about(sample));
    if (!$("detail").open) $("detail").showModal();
    $("detail").scrollTop = 0;
  }

  // Objects of one class that touch would be one area: the mask pane has a colour per object, unless it is changed.
  let byInstance = true;

  function showMasks() {
    const sample = data.samples[current];
    fillFrame($("mask"), sample, ratioOf(sample), false, { byInstance });
    body("objects").replaceChildren(...sample.objects.map(objectRow));
    $("colours").textContent = byInstance ? "by instance" : "by class";
    $("colours").setAttribute("aria-label", `Colours of the masks: ${$("colours").textContent}`);
  }

  function highlight(place, active) {
    for (const shape of $("detail").querySelectorAll(".shape")) {
      const own = Number(shape.dataset.place) === place;
      shape.classList.toggle("highlighted", active && own);
      shape.classList.toggle("dim", active && !own);
    }
    const row = body("objects").children[place];
    if (row) row.classList.toggle("highlighted", active);
  }

  function objectRow(object, place) {
    const known = classes.get(object.class);
    const label = object.label && known && ![known.mid, known.name].includes(object.label) ? ` (${object.label})` : "";
    const colour = byInstance ? ofInstance(place) : colourOf(object.class);
    const name = make("th", { scope: "row" }, named(colour, nameOf(object.class) + label));
    const flags = object.flags.map((flag) => data.flags[flag]);
    if (object.prediction) flags.push(`mask predicted by ${object.prediction.run}, score ${object.prediction.score.toFixed(2)}`);
    if (object.iou !== null) flags.push(`predicted IoU ${object.iou}`);
    const share = object.share === null ? "no mask" : `${(100 * object.share).toFixed(object.share < 0.1 ? 1 : 0)} %`;
    const row = make("tr", { tabindex: "0" }, name, make("td", { text: flags.join(", ") }), make("td", { text: share }));
    for (const [event, active] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      row.addEventListener(event, () => highlight(place, active));
    }
    return row;
  }

  function about(sample) {
    const names = (ids) => make("span", { class: "data" }, ...(ids.length ? listed(ids.map(nameOf)) : ["none"]));
    const entries = [
      ...term("Title", make("span", { class: "data", text: sample.title || "unknown" })),
      ...term("Author", link(sample.author || (sample.author_url ? "" : "unknown"), sample.author_url)),
      ...term("Licence", sample.license ? link("", sample.license) : "unknown"),
    ];
    if (sample.original_url) entries.push(...term("Source", link("", sample.original_url)));
    entries.push(...term("Size", `${sample.width} × ${sample.height} pixels, ${sample.split}`));
    if (sample.rotation) entries.push(...term("Rotation", `upright after a rotation of ${sample.rotation}° counter-clockwise`));
    entries.push(...term("Verified present", names(sample.present)), ...term("Verified absent", names(sample.absent)));
    if (sample.partial.length) entries.push(...term("Not all annotated", names(sample.partial)));
    return entries;
  }

  function step(by) {
    const place = visible[visible.indexOf(current) + by];
    if (place !== undefined) open(place);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input")) return;
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const kind = { m: "masks", b: "boxes" }[event.key.toLowerCase()];
    if (kind) toggle(kind);
    else if ($("detail").open && event.key.toLowerCase() === "c") $("colours").click();
    else if ($("detail").open && (event.key === "ArrowRight" || event.key === "ArrowLeft")) step(by);
    else if (by && event.target.closest(".card")) {
      const at = visible.findIndex((place) => cards[place].button === document.activeElement) + by;
      if (visible[at] === undefined) return;
      cards[visible[at]].button.focus();
    } else return;
    event.preventDefault();
  }

  for (const element of document.querySelectorAll(".if-predicted")) element.hidden = !hasPredicted;
  showFacts();
  showTabs();
  showClasses();
  makePatterns();
  makeFilters();
  makeToggles();
  filter();
  $("gallery-note").textContent = `${several(cards.length, "sample")}, chosen by a hash (seed ${data.seed}) so that rare classes occur as often as frequent ones. Open one to see its masks, flags and author.`;
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  for (const id of ["photo", "mask"]) {
    for (const [event, active] of [["mouseover", true], ["mouseout", false]]) {
      $(id).addEventListener(event, ({ target }) => {
        const shape = target.closest(".shape");
        if (shape) highlight(Number(shape.dataset.place), active);
      });
    }
  }
  $("colours").addEventListener("click", () => { byInstance = !byInstance; showMasks(); });
  $("close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
  $("detail").addEventListener("close", () => { if (visible.includes(current)) cards[current].button.focus(); });
  document.addEventListener("keydown", onKey);
})();
