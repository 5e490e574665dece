// Small helpers: elements, storage that may be forbidden, numbers as people read them.

export const byId = (id) => document.getElementById(id);

// Children that are strings become text nodes: nothing here ever parses markup.
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export const button = (label, onclick, properties = {}) => element("button", { type: "button", onclick, ...properties }, label);

// A browser that forbids storage throws at the first touch; the page then forgets, and works.
function storage(kind) {
  return {
    get(key) {
      try {
        return window[kind].getItem(key);
      } catch {
        return null;
      }
    },
    set(key, value) {
      try {
        if (value === null) window[kind].removeItem(key);
        else window[kind].setItem(key, value);
      } catch {
        // Forgotten with the page.
      }
    },
  };
}
export const local = storage("localStorage");
export const session = storage("sessionStorage");

const whole = new Intl.NumberFormat("en");
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
export const count = (number) => whole.format(number);
export const decimal = (number) => tenth.format(number);

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) {
    number /= 1024;
    unit += 1;
  }
  const digits = unit === 0 ? 0 : number < 100 ? 1 : 0;
  return `${number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${units[unit]}`;
}

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

let clearing = 0;
// Tells screen readers; emptied again, so that nobody meets the text a second time further down the page.
export function announce(text) {
  const region = byId("status");
  region.textContent = text;
  clearTimeout(clearing);
  clearing = setTimeout(() => (region.textContent = ""), 8000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // The clipboard API is absent on plain http to another machine.
    const area = element("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
