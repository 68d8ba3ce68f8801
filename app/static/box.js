// A box that is drawn over what the network saw, by pointer or by keyboard.

const STEP = 1 / 16;
const SMALLEST = 1 / 32;
const FIRST = { left: 0.375, top: 0.375, right: 0.625, bottom: 0.625 };

/**
 * Let a box be drawn on an element that lies over what the network saw.
 *
 * Pointer: drag a new one, or the one there is. Keyboard, with the focus on the element: Enter or Space puts one in the
 * middle, arrows move it, Shift and arrows move its lower right corner, Delete, Backspace or Escape take it away. A
 * finger draws only while the element has the class `drawing`; else it scrolls the page.
 *
 * @param surface element, positioned over what the network saw
 * @param frame element inside it that shows the box
 * @param changed called with {left, top, right, bottom}, fractions of what the network saw, or null
 * @returns {get, set, enabled}: the box; put one, or null; whether one may be drawn
 */
export function boxOn(surface, frame, changed) {
  let box = null;
  let drag = null;
  const control = { get: () => box, set, enabled: false };

  function set(next) {
    box = next;
    frame.hidden = box === null;
    if (box) {
      Object.assign(frame.style, {
        left: `${100 * box.left}%`,
        top: `${100 * box.top}%`,
        width: `${100 * (box.right - box.left)}%`,
        height: `${100 * (box.bottom - box.top)}%`,
      });
    }
    changed(box);
  }

  function placeOf(event) {
    const { left, top, width, height } = surface.getBoundingClientRect();
    return { x: clamp((event.clientX - left) / width), y: clamp((event.clientY - top) / height) };
  }

  surface.addEventListener("pointerdown", (event) => {
    const touch = event.pointerType === "touch" && !surface.classList.contains("drawing");
    if (!control.enabled || event.button !== 0 || touch) return;
    const from = placeOf(event);
    const within = box && from.x > box.left && from.x < box.right && from.y > box.top && from.y < box.bottom;
    drag = { from, box: within ? box : null };
    surface.setPointerCapture(event.pointerId);
    surface.focus({ preventScroll: true });
    event.preventDefault();
  });
  surface.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const to = placeOf(event);
    if (drag.box) {
      set(moved(drag.box, to.x - drag.from.x, to.y - drag.from.y));
      return;
    }
    const next = {
      left: Math.min(drag.from.x, to.x),
      top: Math.min(drag.from.y, to.y),
      right: Math.max(drag.from.x, to.x),
      bottom: Math.max(drag.from.y, to.y),
    };
    if (next.right - next.left >= SMALLEST && next.bottom - next.top >= SMALLEST) set(next);
  });
  for (const end of ["pointerup", "pointercancel"]) surface.addEventListener(end, () => (drag = null));

  surface.addEventListener("keydown", (event) => {
    if (!control.enabled || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (["Enter", " "].includes(event.key)) set(box ?? FIRST);
    else if (["Delete", "Backspace", "Escape"].includes(event.key) && box) set(null);
    else if (arrow && box) {
      const [across, down] = arrow.map((way) => way * STEP);
      set(event.shiftKey ? resized(box, across, down) : moved(box, across, down));
    } else return;
    event.preventDefault();
  });

  return control;
}

const clamp = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));

function moved(box, across, down) {
  const x = clamp(across, -box.left, 1 - box.right);
  const y = clamp(down, -box.top, 1 - box.bottom);
  return { left: box.left + x, top: box.top + y, right: box.right + x, bottom: box.bottom + y };
}

function resized(box, across, down) {
  const right = clamp(box.right + across, box.left + STEP, 1);
  return { ...box, right, bottom: clamp(box.bottom + down, box.top + STEP, 1) };
}
