"""A web service of your own: POST /image with a prompt, get a PNG.

    python examples/fastapi_app.py --model demo
    curl localhost:8002/image -H 'content-type: application/json' -d '{"prompt": "a red circle"}' -o a.png

`qwen-image-mlx serve` is the complete server, with jobs, previews, limits and a token. This shows what a service of
your own needs: one worker thread for the pipeline, and errors as HTTP answers. Needs FastAPI and uvicorn:
`pip install ".[server]"` in the checkout.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import mlx.core as mx

from qwen_image_mlx import GPUError, QwenImagePipeline, RequestError

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Response
    from pydantic import BaseModel, Field
except ImportError:
    sys.exit('fastapi_app.py needs FastAPI and uvicorn: pip install ".[server]" in the checkout')


class Wish(BaseModel):
    """The body of a request."""

    prompt: str = Field(max_length=8000)
    seed: int = Field(0, ge=0)
    steps: int | None = Field(None, ge=1, le=100)


def create_app(model: str) -> FastAPI:
    """The service for one model."""
    pipeline, pool = QwenImagePipeline.from_pretrained(model), ThreadPoolExecutor(max_workers=1)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.submit(mx.clear_streams)  # with MLX 0.32 the process may otherwise abort at exit
        pool.shutdown()

    app = FastAPI(lifespan=lifespan)

    def generate(wish: Wish) -> bytes:
        (image,) = pipeline.generate(
            wish.prompt, negative_prompt=" ", seed=wish.seed, num_inference_steps=wish.steps, progress=False
        )
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    @app.post("/image")
    async def image(wish: Wish) -> Response:
        try:
            png = await asyncio.get_running_loop().run_in_executor(pool, generate, wish)
        except RequestError as error:
            raise HTTPException(422, str(error)) from error
        except GPUError as error:
            raise HTTPException(503, str(error)) from error
        return Response(png, media_type="image/png")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--port", type=int, default=8002)
    arguments = parser.parse_args()
    uvicorn.run(create_app(arguments.model), port=arguments.port)
