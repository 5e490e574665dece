// Settings: kept in this browser; the API key only in this tab.

import { apiKey } from "./api.js";
import { byId, local } from "./dom.js";

const STORE = "cadre.settings";
const DEFAULTS = { temperature: 0.8, top_p: 0.95, max_tokens: 256, seed: null };

export class Settings {
  constructor() {
    this.dialog = byId("settings");
    this.values = { ...DEFAULTS, ...stored() };
    this.longest = Infinity;
    for (const name of Object.keys(DEFAULTS)) byId(name).addEventListener("input", () => this.#read(name));
    byId("api_key").addEventListener("input", ({ target }) => target.checkValidity() && apiKey.set(target.value));
    byId("settings-open").addEventListener("click", () => this.open());
    byId("settings-reset").addEventListener("click", () => {
      this.values = { ...DEFAULTS };
      local.set(STORE, null);
      this.#fill();
    });
    this.dialog.addEventListener("click", ({ target }) => target === this.dialog && this.dialog.close());
  }

  // A context shorter than the wish leaves half of it for the prompt.
  fit(context) {
    this.longest = context ?? Infinity;
    byId("max_tokens").max = Number.isFinite(this.longest) ? this.longest : "";
  }

  get maxTokens() {
    return Math.max(1, Math.min(this.values.max_tokens, Math.floor(this.longest / 2)));
  }

  // The sampling part of a request, in OpenAI's names.
  get sampling() {
    const { temperature, top_p, seed } = this.values;
    return { temperature, top_p, ...(seed === null ? {} : { seed }) };
  }

  // Resolves when the dialog is closed. `note`: why it opened by itself; the key is then what is asked for.
  open(note = "") {
    this.#fill();
    byId("settings-note").textContent = note;
    byId("settings-note").hidden = !note;
    if (!this.dialog.open) this.dialog.showModal();
    byId(note ? "api_key" : "temperature").focus();
    return new Promise((resolve) => this.dialog.addEventListener("close", resolve, { once: true }));
  }

  #fill() {
    for (const [name, value] of Object.entries(this.values)) byId(name).value = value ?? "";
    byId("api_key").value = apiKey.get();
    this.#show();
  }

  #read(name) {
    const input = byId(name);
    if (!input.checkValidity()) return;
    this.values[name] = input.value === "" ? null : Number(input.value);
    local.set(STORE, JSON.stringify(this.values));
    this.#show();
  }

  #show() {
    byId("temperature-now").value = this.values.temperature.toFixed(2);
    byId("top_p-now").value = this.values.top_p.toFixed(2);
  }
}

// What an older page or a curious hand left behind must not stop this one: only numbers of known names come through.
function stored() {
  try {
    const found = Object.entries(JSON.parse(local.get(STORE)) ?? {});
    return Object.fromEntries(found.filter(([name, value]) => name in DEFAULTS && (Number.isFinite(value) || (name === "seed" && value === null))));
  } catch {
    return {};
  }
}

// Light or dark: the system's choice until the button is pressed; pressed back to it, the system's again.
export function theme(changed) {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const apply = (chosen) => {
    if (chosen) root.dataset.theme = chosen;
    else delete root.dataset.theme;
    byId("theme").setAttribute("aria-pressed", String(dark()));
    changed();
  };
  const follow = () => apply(root.dataset.theme); // theme.js has set it, where there was a choice
  follow();
  system.addEventListener("change", follow);
  byId("theme").addEventListener("click", () => {
    const wanted = dark() ? "light" : "dark";
    const chosen = (wanted === "dark") === system.matches ? null : wanted;
    local.set("cadre.theme", chosen);
    apply(chosen);
  });
}
