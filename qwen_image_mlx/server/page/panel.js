// The panel of one task: its form, its wells, the running job and the result.

import { ApiError, follow, submit } from "./api.js";
import { ControlView, offerControls, withControl } from "./control.js";
import { all, button, duration, el, one, say } from "./dom.js";
import { newId, note, tab, unnote } from "./history.js";
import { markSmall } from "./images.js";
import { makeWell } from "./well.js";

const STAGES = {
  queued: "Waiting",
  download: "Downloading the model",
  load: "Loading the model",
  quantize: "Quantizing the model",
  encode: "Encoding the prompt",
  caption: "Captioning the image",
  denoise: "Generating",
  decode: "Decoding the image",
};
const AGAIN = ["gone", "stopped", "stopping", "timeout"]; // error codes that offer a retry
const COUNTED = ["denoise", "caption", "download"];

/**
 * @param {HTMLElement} section the panel; `data-task` is its task.
 * @param {string} verb the label of its button.
 * @param {(result: object, settings: object, before: ?string, kept: object) => Promise<Node>} show creates the
 *   elements for a result; `kept` holds the entry's id in the history and the changes made to it.
 * @param {(entry: object) => Promise<void>} onResult called with every result.
 */
export class Panel {
  constructor(section, verb, show, onResult) {
    this.section = section;
    this.task = section.dataset.task;
    this.form = one("form", section);
    this.stage = one(".stage", section);
    this.show = show;
    this.onResult = onResult;
    this.running = null;
    this.offered = false;
    this.shown = null; // id of the history entry on the stage
    this.restored = false;
    this.needsPrompt = false; // to decompose an image
    const common = one("[data-common]", this.form);
    common.append(one("#common").content.cloneNode(true));
    if (this.task === "decompose") one("[data-count]", common).remove();
    this.notice = el("p", { class: "notice", role: "alert", hidden: true });
    this.button = el("button", { class: "primary", "data-go": "" }, verb);
    this.stop = button("Cancel", () => this.cancel(), { "data-cancel": "", hidden: true });
    this.model = el("p", { class: "faint" });
    one(".go", this.form).append(this.notice, el("div", { class: "row" }, this.button, this.stop,
      el("span", { class: "faint keys" }, /Mac|iP/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵")), this.model);
    one("[data-control-part]", this.form)?.append(one("#control").content.cloneNode(true));
    this.view = new ControlView(this.form, (message) => this.say(message));
    this.wells = all("[data-well]", this.form).map((node) => makeWell(node, () => this.follow(), (message) => this.say(message)));
    this.form.noValidate = true; // `start` validates, so that the keys and the button behave alike
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    this.form.addEventListener("input", () => this.follow());
    section.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      section.classList.add("dropping");
    });
    section.addEventListener("dragleave", (event) => {
      if (!section.contains(event.relatedTarget)) section.classList.remove("dropping");
    });
    section.addEventListener("drop", (event) => {
      event.preventDefault();
      section.classList.remove("dropping");
      this.take([...event.dataTransfer.files]);
    });
    this.follow();
  }

  /** Adds files to the panel's first well. */
  take(files) {
    const [well] = this.wells;
    const around = well.node.closest("details");
    if (around && files.length) around.open = true;
    return well.add(files);
  }

  /** Adapts the form to the server's configuration. */
  configure(said) {
    const { tasks, defaults = {}, fields = {}, limits = {} } = said;
    const offer = tasks[this.task];
    this.offered = Boolean(offer);
    this.button.disabled = !offer;
    this.model.textContent = offer ? offer.model : "";
    if (!offer) {
      this.say("This server has no model for this task. Add one to its config.toml.");
      return;
    }
    this.notice.hidden = true;
    offerControls(this.form, said);
    const form = this.form.elements;
    for (const [name, field] of Object.entries(fields[this.task] ?? {})) this.offer(name, field);
    form.steps.placeholder = offer.steps ?? defaults.steps ?? "";
    form.cfg_scale.placeholder = offer.cfg_scale ?? defaults.cfg_scale ?? "";
    form.negative_prompt.placeholder = defaults.negative_prompt ?? "";
    if (defaults.seed != null) form.seed.placeholder = defaults.seed;
    if (limits.max_steps) form.steps.max = limits.max_steps;
    if (form.num_images && limits.num_images) form.num_images.max = limits.num_images;
    if (form.num_layers) form.num_layers.value = offer.num_layers ?? defaults.num_layers ?? form.num_layers.value;
    const described = one("[data-captions]", this.form);
    if (described) {
      described.hidden = this.needsPrompt = offer.captions === false;
      if (!described.hidden) form.prompt.placeholder = "Leave empty to let the model describe the image";
    }
    if (form.resolution) {
      const usual = offer.resolution ?? defaults.resolution;
      form.resolution.replaceChildren(...(offer.resolutions ?? []).map((side) =>
        el("option", { value: side, selected: side === usual }, `${side} × ${side}`)));
      one("[data-resolutions]", this.form).hidden = !(offer.resolutions?.length > 1);
    }
    const chips = one("[data-aspects] .chips", this.form);
    if (chips) {
      const usual = defaults.aspect ?? "1:1";
      chips.replaceChildren(...Object.entries(offer.sizes ?? {}).map(([aspect, [width, height]]) =>
        el("label", { class: "chip", title: `${width} × ${height} pixels` },
          el("input", { type: "radio", name: "aspect", value: aspect, checked: aspect === usual }),
          el("span", {}, aspect, el("small", {}, `${width} × ${height}`)))));
      if (chips.children.length < 2) chips.parentNode.remove();
    }
    this.follow();
  }

  /** Sets an input's range to the server's; adds an input for a field that the page does not have. */
  offer(name, { type, min, max, choices = [], help }) {
    let input = this.form.elements[name];
    if (!input) {
      const step = type === "number" ? "any" : "1";
      const words = name.replaceAll("_", " ");
      input = type === "choice"
        ? el("select", { name }, el("option", { value: "" }, "Default"), ...choices.map((value) => el("option", { value }, value)))
        : el("input", { name, type: { switch: "checkbox", text: "text" }[type] ?? "number", ...(type === "number" || type === "integer" ? { step } : {}) });
      one("[data-common]", this.form).append(el("label", { class: type === "switch" ? "check" : "field", title: help },
        ...(type === "switch" ? [input, " ", el("span", {}, words)] : [el("span", {}, words), input])));
    }
    if (input.type === "number" && Number.isSafeInteger(min)) input.min = min;
    if (input.type === "number" && Number.isSafeInteger(max)) input.max = max;
  }

  /** Saves the form soon, so that it can be restored when the page is opened again. */
  keep() {
    clearTimeout(this.keeping);
    if (this.restored) this.keeping = setTimeout(() => this.save(), 200);
  }

  /** Saves the form and which result it shows. */
  async save() {
    clearTimeout(this.keeping);
    await note({
      id: `form ${tab} ${this.task}`, kind: "form", task: this.task, settings: this.settings(), wells: this.chosen(), shown: this.shown,
    });
  }

  /** The images and masks of the wells, by the wells' names. */
  chosen() {
    return Object.fromEntries(this.wells.filter(({ images }) => images.length).map(({ name, images, mask }) => [name, { images, mask }]));
  }

  /** Shows or hides the fields that depend on an image or a mask, and updates the sliders' values. */
  follow() {
    this.keep();
    const filled = { image: false, mask: false, layer: Boolean(this.form.elements.layer_prompt?.value.trim()) };
    this.view?.follow(this.wells?.find(({ name }) => name === "control"));
    for (const well of this.wells ?? []) {
      if (well.name === "control") continue;
      filled.image ||= well.images.length > 0;
      filled.mask ||= Boolean(well.mask);
      filled.layer ||= Boolean(well.mask) && well.maskField === "layer_mask";
    }
    if (this.task === "decompose") this.form.elements.prompt.required = this.needsPrompt && !filled.layer;
    for (const node of all("[data-with]", this.form)) node.hidden = !filled[node.dataset.with];
    for (const node of all("[data-without]", this.form)) node.hidden = filled[node.dataset.without];
    for (const node of all(".slider input[type=range]", this.form)) {
      const output = one("output", node.parentNode);
      if (output) output.textContent = Number(node.max) === 1 ? `${Math.round(node.value * 100)}%` : node.value;
    }
  }

  /** The form's values as the API's fields, without empty and hidden inputs. */
  settings() {
    const fields = {};
    for (const input of this.form.elements) {
      if (!input.name || input.closest("[hidden]:not(.panel)") || (input.type === "radio" && !input.checked)) continue;
      if (input.type === "checkbox") {
        if (input.checked) fields[input.name] = true;
      } else if (input.value.trim()) {
        const numeric = ["number", "range"].includes(input.type) || input.dataset.type === "number";
        fields[input.name] = numeric ? Number(input.value) : input.value;
      }
    }
    return fields;
  }

  /** Fills the form with settings and images. */
  fill(settings, wells = {}) {
    for (const input of this.form.elements) {
      if (!input.name) continue;
      const value = settings[input.name];
      if (input.type === "radio") input.checked = value === undefined ? input.defaultChecked : input.value === value;
      else if (input.type === "checkbox") input.checked = Boolean(value);
      else if (value !== undefined) input.value = value;
      else if (input.type !== "range" && input.tagName !== "SELECT") input.value = "";
    }
    for (const well of this.wells) {
      const { images = [], mask = null } = wells[well.name] ?? {};
      well.set(images, mask);
      const around = well.node.closest("details");
      if (around) around.open = images.length > 0;
    }
    this.follow();
  }

  /** Shows a message above the button. `again` offers a retry after this many seconds; 0 offers it at once. */
  say(message, again = null) {
    clearInterval(this.countdown);
    this.notice.hidden = false;
    this.notice.replaceChildren(message);
    if (again == null) return;
    const retry = button("Try again", () => this.start(), { class: "link" });
    const left = el("span", { class: "faint" });
    this.notice.append(" ", left, " ", retry);
    const tick = () => {
      left.textContent = again > 0 ? `(${again} s)` : "";
      retry.disabled = again > 0;
      if (again <= 0) clearInterval(this.countdown);
      again -= 1;
    };
    tick();
    this.countdown = setInterval(tick, 1000);
  }

  /** Cancels the running job; true if there was one. */
  cancel() {
    if (!this.running) return false;
    this.running.abort();
    this.stop.disabled = true;
    return true;
  }

  /** Runs the job that the form describes. */
  async start() {
    if (this.running || !this.offered) return;
    clearInterval(this.countdown);
    this.notice.hidden = true;
    const missing = this.wells.find((well) => !well.images.length && !well.node.closest("details"));
    if (missing) {
      this.say("Choose an image first.");
      return;
    }
    for (const wrong of all("details :invalid", this.form)) wrong.closest("details").open = true;
    if (!this.form.reportValidity()) return;
    const settings = this.settings();
    const wells = this.chosen();
    const fields = withControl(settings, wells.control);
    for (const { name, max, maskField } of this.wells) {
      if (!wells[name] || name === "control") continue;
      const { images, mask } = wells[name];
      fields[name] = max > 1 ? images.map(({ url }) => url) : images[0].url;
      if (mask) fields[maskField] = mask.url;
    }
    await this.attend(settings, wells, async () => {
      const job = await submit(this.task, fields);
      const record = { id: `job ${job}`, kind: "job", job, task: this.task, entry: newId(), settings, wells };
      await note(record);
      return record;
    });
  }

  /** Resumes a job that was started before the page was opened. */
  async resume(record) {
    this.fill(record.settings, record.wells);
    await this.attend(record.settings, record.wells, async () => record);
  }

  /** Shows a job's progress until its end, then its result or its error. */
  async attend(settings, wells, begin) {
    let record = null;
    this.running = new AbortController();
    const focused = document.activeElement === this.button;
    this.stop.disabled = true; // for a moment, so that a double click does not cancel
    setTimeout(() => { this.stop.disabled = !this.running || this.running.signal.aborted; }, 500);
    this.button.hidden = !(this.stop.hidden = false);
    const before = [...this.stage.childNodes];
    const progress = new Progress();
    this.stage.replaceChildren(progress.node);
    progress.node.scrollIntoView({ block: "nearest", behavior: "smooth" });
    try {
      record = await begin();
      const result = await follow(record.job, (event, data) => progress.tell(event, data), this.running.signal);
      await this.onResult({ task: this.task, settings, wells, result, id: record.entry });
      await this.present(result, settings, wells, { id: record.entry });
      await this.save(); // before the job is forgotten: a reload at this moment finds the one or the other
      say("Done.");
    } catch (error) {
      this.stage.replaceChildren(...before);
      if (!(error instanceof ApiError)) {
        this.say("Something went wrong on this page.");
        throw error;
      }
      if (error.code === "cancelled") say("Cancelled.");
      else this.say(error.message, AGAIN.includes(error.code) ? 0 : error.retryAfter || null);
    } finally {
      if (record) await unnote(record.id);
      this.running = null;
      this.button.hidden = !(this.stop.hidden = true);
      if (focused && document.activeElement === document.body) this.button.focus({ preventScroll: true });
    }
  }

  /** Shows a result. */
  async present(result, settings, wells, kept) {
    const well = wells.image ?? wells.images;
    this.stage.replaceChildren(await this.show(result, settings, well?.images[0].url, kept));
    this.shown = kept.id;
    this.keep();
  }
}

/** A job's progress: a preview, a bar and a text. */
class Progress {
  constructor() {
    this.preview = el("img", { alt: "", hidden: true });
    this.bar = el("progress", { max: 1, "aria-label": "Progress" });
    this.now = el("span", {}, "Sending");
    this.left = el("span", { class: "faint" });
    this.quarter = 0;
    this.node = el("div", { class: "progress" }, el("div", { class: "frame waiting" }, this.preview), this.bar,
      el("p", { class: "row" }, this.now, el("span", { class: "grow" }), this.left));
  }

  tell(event, data) {
    ({
      queued: ({ position }) => this.words(position ? `Waiting: ${position} ahead in the queue` : STAGES.queued),
      stage: ({ stage, detail }) => {
        this.stage = stage;
        this.bar.removeAttribute("value");
        this.left.textContent = COUNTED.includes(stage) ? "" : detail;
        this.words(STAGES[stage] ?? stage);
      },
      step: ({ step, total, seconds_left: left }) => {
        this.bar.value = total ? step / total : 0;
        if (this.stage === "denoise") this.now.textContent = `${STAGES.denoise}, step ${step} of ${total}`;
        this.left.textContent = left == null ? "" : `${duration(left)} left`;
        const quarter = Math.floor((4 * step) / (total || 1));
        if (quarter > this.quarter) say(`${25 * quarter} percent`);
        this.quarter = quarter;
      },
      preview: ({ image }) => {
        this.preview.src = image;
        this.preview.hidden = false;
        this.preview.onload = () => markSmall(this.preview.parentNode, this.preview.naturalWidth, this.preview.naturalHeight);
      },
      lost: () => {
        this.left.textContent = "";
        this.words("Connection lost, trying again. The job is still running.");
      },
    })[event]?.(data);
  }

  words(text) {
    this.now.textContent = text;
    say(text);
  }
}
