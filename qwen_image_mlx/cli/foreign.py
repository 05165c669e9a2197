"""Flags and commands of other programs, and their equivalents here. Pure data, used only in error messages."""

from __future__ import annotations

_LORA = "--lora FILE STRENGTH, once for each"
_IMAGE = "--image"
_NO_CONTROL = "nothing: ControlNets are not supported here"
_NO_CACHE = "nothing: every step is computed; --lightning 8 or fewer --steps are faster"
_NO_SAMPLER = "nothing: the schedule is the model's own flow-matching Euler"
_RECORDED = "nothing: every image carries its parameters; `info` prints them and --from-image repeats them"
_MEMORY = "--memory auto"
_UNATTENDED = "nothing: this program never asks a question"

# mflux, diffusers and its scripts, mlx-lm, A1111 and its relatives, ComfyUI's command line, Draw Things.
FOREIGN = {
    # prompts
    "--text": "--prompt",
    "--neg": "--negative-prompt",
    "--negative": "--negative-prompt",
    "--neg-prompt": "--negative-prompt",
    "--negative_prompt": "--negative-prompt",
    "--uncond": "--negative-prompt",
    "--prompt-file": "--prompts-file",
    "--prompt-from-file": "--prompts-file",
    "--from-file": "--prompts-file",
    "--prompts": "--prompts-file",
    "--system-prompt": "nothing: the model's own template is used",
    # sampling
    "--cfg": "--cfg-scale",
    "--cfg_scale": "--cfg-scale",
    "--guidance-scale": "--cfg-scale",
    "--guidance_scale": "--cfg-scale",
    "--true-cfg-scale": "--cfg-scale",
    "--true_cfg_scale": "--cfg-scale",
    "--scale": "--cfg-scale",
    "--num-inference-steps": "--steps",
    "--num_inference_steps": "--steps",
    "--num-steps": "--steps",
    "--sampling-steps": "--steps",
    "--ddim_steps": "--steps",
    "--n-iter": "--num-images",
    "--n_iter": "--num-images",
    "--n-samples": "--num-images",
    "--batch-size": "--num-images",
    "--batch-count": "--num-images",
    "--num-images-per-prompt": "--num-images",
    "--num_images_per_prompt": "--num-images",
    "--auto-seeds": "--seeds 1-4, or --num-images",
    "--sampler": _NO_SAMPLER,
    "--sampler-name": _NO_SAMPLER,
    "--sampling-method": _NO_SAMPLER,
    "--scheduler": _NO_SAMPLER,
    "--step-cache-ratio": _NO_CACHE,
    "--cfg-end": _NO_CACHE,
    "--clip-skip": "nothing: these models have no CLIP",
    "--temp": "nothing: captions are drawn as the checkpoint says",
    "--max-tokens": "nothing: captions end by themselves",
    # images
    "--image-paths": "--image, once for each",
    "--images": "--image, once for each",
    "--init-image": _IMAGE,
    "--init-img": _IMAGE,
    "--init_image": _IMAGE,
    "--input": _IMAGE,
    "--input-image": _IMAGE,
    "--reference-image": "edit --image",
    "--image-strength": "--strength",
    "--denoising-strength": "--strength",
    "--denoise": "--strength",
    "--mask-path": "--mask",
    "--mask-image": "--mask",
    "--masked-image-path": "--mask",
    "--resolution": "--width and --height, or --aspect",
    "--aspect-ratio": "--aspect",
    "--ar": "--aspect",
    "--controlnet-image-path": _NO_CONTROL,
    "--controlnet-strength": _NO_CONTROL,
    "--controlnet": _NO_CONTROL,
    # the model
    "--base-model": "--model",
    "--model-path": "--model",
    "--model-id": "--model",
    "--ckpt": "--model, or --transformer FILE",
    "--checkpoint": "--model, or --transformer FILE",
    "--bits": "--quantize",
    "--q-bits": "--quantize",
    "--precision": "--dtype",
    "--torch-dtype": "--dtype",
    "--lora-path": _LORA,
    "--lora-paths": _LORA,
    "--lora-scale": _LORA,
    "--lora-scales": _LORA,
    "--lora-style": _LORA,
    "--adapter-path": _LORA,
    "--lora-name": _LORA,
    "--trust-remote-code": "nothing: no code of a model is ever run",
    "--device": "nothing: MLX takes the GPU, where there is one",
    # speed and memory
    "--low-ram": _MEMORY,
    "--lowvram": _MEMORY,
    "--medvram": _MEMORY,
    "--low-vram": _MEMORY,
    "--enable-model-cpu-offload": _MEMORY,
    "--offload": _MEMORY,
    "--mlx-cache-limit-gb": "--memory 16GB",
    "--max-memory": "--memory 16GB",
    "--vae-tiling": "nothing: images are decoded in strips, sized for the memory",
    "--battery-percentage-stop-limit": "nothing: Ctrl-C stops, and the same command continues with the missing images",
    # results
    "--out": "--output",
    "--outdir": "--output DIR/",
    "--output-dir": "--output DIR/",
    "--output-path": "--output",
    "--outpath": "--output",
    "--metadata": _RECORDED,
    "--make-conf": _RECORDED,
    "--config-from-metadata": "--from-image",
    "-C": "--from-image",
    "--stepwise-image-output-dir": "--preview",
    "--no-progress": "--quiet",
    "--silent": "--quiet",
    "--debug": "--verbose",
    "-v": "--verbose",
    "--dry-run": "the command `plan`, which estimates memory use",
    "--yes": _UNATTENDED,
    "-y": _UNATTENDED,
}

COMMANDS = {
    "txt2img": "generate",
    "text2image": "generate",
    "t2i": "generate",
    "image": "generate",
    "img2img": "generate --image",
    "inpaint": "generate --image --mask, or edit --image --mask",
    "fill": "edit --image --mask",
    "layers": "decompose",
    "split": "decompose",
    "describe": "caption",
    "interrogate": "caption",
    "convert": "quantize",
    "save": "quantize",
    "fuse": "quantize, which takes --model and no LoRA; --lora merges while generating",
    "lora-train": "train",
    "finetune": "train",
    "server": "serve",
    "webui": "serve",
    "ui": "serve",
    "download": "nothing: a model is downloaded when it is first needed; `plan` says how large it is",
    "pull": "nothing: a model is downloaded when it is first needed; `plan` says how large it is",
    "models": "plan MODEL for one, or --model with a name such as 2512, edit-2511 or layered",
    "list": "plan MODEL for one, or --model with a name such as 2512, edit-2511 or layered",
    "upscale": "nothing: images are not enlarged here; edit --size WxH generates larger",
    "version": "--version",
    "help": "--help",
}


def answer(name: str) -> str:
    """What to use instead of a flag or command of another program; "" if it is not known."""
    ours = FOREIGN.get(name) or COMMANDS.get(name, "")
    head, _, why = ours.partition("nothing: ")
    return f"leave it out: {why}" if why and not head else f"give {ours}" if ours else ""
