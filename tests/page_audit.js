// Runs inside an open page and resolves to what is wrong with it, one "kind: where, what" per fault.
// width: of the window, in CSS pixels; scheme: "light" or "dark" where the page has to follow it, else "".
async (width, scheme) => {
  const LEAST_CONTRAST = 4.5; // WCAG 2.2, level AA, text of normal size
  const LEAST_SIZE = 10; // CSS pixels on the screen, a chart's scale included
  const faults = new Set();
  const say = (kind, element, what) => faults.add(`${kind}: ${where(element)}, ${what}`);

  function where(element) {
    const mark = element.id ? `#${element.id}` : element.classList.length ? `.${[...element.classList].join(".")}` : "";
    const words = element.textContent.replace(/\s+/g, " ").trim();
    return `${element.localName}${mark} “${words.length > 60 ? words.slice(0, 60) + "…" : words}”`;
  }

  const parents = (element) => (element ? [element, ...parents(element.parentElement)] : []);
  const style = (element) => getComputedStyle(element);
  const isShown = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const isHidden = (element) => Boolean(element.closest("[aria-hidden=true]"));
  const clips = (element) => ["overflowX", "overflowY"].some((axis) => style(element)[axis] !== "visible");

  // --- pictures: loaded, with words, not empty
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) say("broken image", image, image.src.slice(0, 80));
    if (!image.alt.trim() && !isHidden(image)) say("no words", image, "an image without alt text");
  }
  for (const image of document.querySelectorAll("svg image")) {
    const probe = new Image();
    probe.src = image.href.baseVal;
    const isWhole = await probe.decode().then(() => probe.naturalWidth > 0, () => false);
    if (!isWhole) say("broken image", image, image.href.baseVal.slice(0, 80));
  }
  for (const drawing of document.querySelectorAll("svg")) {
    const box = drawing.getBoundingClientRect();
    if (!(box.width && box.height && drawing.querySelector("rect, line, circle, polyline, path, image"))) {
      say("empty", drawing, "a drawing that shows nothing");
    }
    if (isHidden(drawing)) continue;
    const ids = (drawing.getAttribute("aria-labelledby") || "").split(/\s+/).filter(Boolean);
    const words = [drawing.getAttribute("aria-label"), ...ids.map((id) => document.getElementById(id)?.textContent)];
    if (drawing.getAttribute("role") !== "img" || !words.some((text) => text?.trim())) {
      say("no words", drawing, "a drawing that a screen reader cannot name");
    }
  }

  // --- order: one h1 first, no level left out, nothing empty
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    if (!isShown(heading)) continue;
    const next = Number(heading.localName[1]);
    if (next > level + 1 || (next === 1 && level)) say("heading", heading, `level ${next} after level ${level}`);
    if (!heading.textContent.trim()) say("empty", heading, "a heading without words");
    level = next;
  }
  for (const part of document.querySelectorAll("main, section, article, div, figure, p, ul, ol, dl, table, tbody")) {
    const isFilled = part.textContent.trim() || part.querySelector("svg, img") || isHidden(part);
    if (isShown(part) && !isFilled) say("empty", part, "nothing in it");
  }

  // --- width: the page does not scroll sideways; what is wide scrolls in a box of its own
  const isInScroller = (element) => parents(element.parentElement).some((p) => p !== document.body && clips(p));
  if (document.scrollingElement.scrollWidth > width) {
    const wide = [...document.body.querySelectorAll("*")].filter(
      (one) => one.getBoundingClientRect().right > width + 0.5 && !isInScroller(one),
    );
    const culprit = wide.at(-1) || document.body;
    say("too wide", culprit, `the page is ${document.scrollingElement.scrollWidth} px wide in a window of ${width} px`);
  }

  // --- texts: inside their box, not over one another, large enough, enough contrast
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const [node, element] = [walker.currentNode, walker.currentNode.parentElement];
    if (!node.data.trim() || !isShown(element) || element.closest("style, script, title, desc")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const lines = new Set([...range.getClientRects()].map((rect) => Math.round(rect.top)));
    if (lines.size > 1 && /^[−+]?[\d,.]+%?$/.test(node.data.trim())) say("cut", element, "a number over two lines");
    for (const rect of range.getClientRects()) texts.push({ element, box: visiblePart(rect, element) });
    checkBox(element, range);
    checkSize(element);
    checkContrast(element);
  }

  function visiblePart(rect, element) {
    const box = { left: rect.left, right: rect.right, top: rect.top, bottom: rect.bottom };
    for (const parent of parents(element)) {
      if (parent === document.body || parent === document.documentElement) break;
      if (parent instanceof SVGElement || !clips(parent)) continue;
      const edge = parent.getBoundingClientRect();
      box.left = Math.max(box.left, edge.left);
      box.right = Math.min(box.right, edge.right);
      box.top = Math.max(box.top, edge.top);
      box.bottom = Math.min(box.bottom, edge.bottom);
    }
    return box;
  }

  function checkBox(element, range) {
    const drawing = element.closest("svg");
    const holder = drawing || parents(element).find((p) => !["inline", "contents"].includes(style(p).display));
    const [edge, box] = [holder.getBoundingClientRect(), range.getBoundingClientRect()];
    const sides = { left: edge.left - box.left, right: box.right - edge.right };
    if (drawing) Object.assign(sides, { top: edge.top - box.top, bottom: box.bottom - edge.bottom });
    for (const [side, excess] of Object.entries(sides)) {
      if (excess > 1) say("cut", element, `sticks out ${excess.toFixed(0)} px on the ${side} of ${where(holder)}`);
    }
    const scroller = element.closest("caption") && parents(element).find((parent) => style(parent).overflowX === "auto");
    if (scroller && box.right > scroller.getBoundingClientRect().right + 1) say("cut", element, "wider than the screen");
    for (const parent of parents(element)) {
      if (["hidden", "clip"].includes(style(parent).overflowX) && parent.scrollWidth > parent.clientWidth + 1) {
        if (!(parent instanceof SVGElement)) say("cut", element, "hidden by a box that does not scroll");
      }
    }
  }

  function checkSize(element) {
    const drawing = element.closest("svg");
    const size = parseFloat(style(element).fontSize) * (drawing ? drawing.getScreenCTM().a : 1);
    if (size < LEAST_SIZE) say("small", element, `${size.toFixed(1)} px`);
  }

  texts.sort((one, other) => one.box.top - other.box.top);
  texts.forEach(({ element, box }, place) => {
    for (let next = place + 1; next < texts.length && texts[next].box.top < box.bottom; next++) {
      const other = texts[next];
      const [across, down] = [
        Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left),
        Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top),
      ];
      const height = Math.min(box.bottom - box.top, other.box.bottom - other.box.top);
      if (across > 2 && down > 0.4 * height && height > 2) say("overlap", element, `covers ${where(other.element)}`);
    }
  });

  // --- colours
  function layers(value) {
    return [...value.matchAll(/rgba?\(([^)]*)\)/g)].map(([, parts]) => {
      const [red, green, blue, alpha = 1] = parts.split(/[\s,/]+/).map(Number);
      return [red, green, blue, alpha];
    });
  }

  function over([red, green, blue, alpha], below) {
    return [red, green, blue].map((part, n) => part * alpha + below[n] * (1 - alpha));
  }

  // The colour behind an element; a gradient counts where it is of one colour.
  function ground(element) {
    const found = [];
    for (const parent of parents(element)) {
      const made = layers(style(parent).backgroundImage);
      if (made.length && made.every((one) => String(one) === String(made[0]))) found.push(made[0]);
      found.push(layers(style(parent).backgroundColor)[0]);
      if (found.some((layer) => layer[3] === 1)) break;
    }
    return found.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  }

  function luminance(colour) {
    const [red, green, blue] = colour.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }

  function checkContrast(element) {
    const drawing = element.closest("svg");
    const below = ground(drawing ? drawing.parentElement : element);
    const colour = layers(drawing ? style(element).fill : style(element).color)[0];
    const seen = parents(element).reduce((share, parent) => share * Number(style(parent).opacity), 1);
    const levels = [luminance(over([...colour.slice(0, 3), colour[3] * seen], below)), luminance(below)];
    const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
    if (ratio < LEAST_CONTRAST) say("contrast", element, `${ratio.toFixed(2)} to 1`);
  }

  const light = luminance(ground(document.body));
  if ((scheme === "dark" && light > 0.2) || (scheme === "light" && light < 0.5)) {
    say("scheme", document.body, `a ground of luminance ${light.toFixed(2)} for readers who ask for ${scheme}`);
  }
  return [...faults];
}
