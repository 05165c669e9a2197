// Control by an image: the part of a form that chooses a ControlNet, and shows what it sees.

import { controlImage } from "./api.js";
import { el, one } from "./dom.js";

/** Fills in a form's ControlNets and kinds; hides the part of a server that has none. */
export function offerControls(form, { controlnets = [], control_kinds: kinds = [] }) {
  const part = one("[data-control-part]", form);
  if (!part) return;
  part.hidden = !controlnets.length;
  form.elements.controlnet.replaceChildren(...controlnets.map((name) => el("option", { value: name }, name)));
  form.elements.control_kind.replaceChildren(...kinds.map((kind) => el("option", { value: kind }, kind)));
}

/** A job's fields: the form's own, with the inputs of the control made the object that the API takes. */
export function withControl({ controlnet, control_kind: kind, control_scale: scale, ...fields }, well) {
  const image = well?.images[0].url;
  return image ? { ...fields, controls: [{ controlnet, image, kind, scale }] } : fields;
}

/** Shows what the ControlNet sees, next to the well. */
export class ControlView {
  constructor(form, refuse) {
    this.form = form;
    this.refuse = refuse;
    this.node = one("[data-control-view]", form);
    this.shown = "";
  }

  async follow(well) {
    const image = well?.images[0]?.url;
    const kind = this.form.elements.control_kind?.value;
    const wanted = image ? `${kind} ${image}` : "";
    if (!this.node || wanted === this.shown) return;
    this.shown = wanted;
    this.node.hidden = true;
    if (!image) return;
    try {
      const { image: view } = await controlImage(image, kind);
      if (wanted !== this.shown) return;
      one("img", this.node).src = view;
      this.node.hidden = false;
    } catch (error) {
      this.refuse(error.message);
    }
  }
}
