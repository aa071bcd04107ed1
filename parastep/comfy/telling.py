"""ComfyUI: what the report node shows of a run, in words and as an image."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..report.report import Report


def words(report: Report) -> str:
    if not report.steps and report.fallback is not None:
        return f"ran serially: {report.fallback}"
    lines = [str(report), f"evaluations on each rank: {report.evaluations}"]
    known = [drift for drift in report.drift if math.isfinite(drift)]
    if known:
        worst = max(known)
        lines.append(f"drift of the guesses: mean {sum(known) / len(known):.4f}, worst {worst:.4f}")
    lines += [f"rank {f.rank} {f.became} at step {f.step}: {f.text}" for f in report.failures]
    return "\n".join(lines)


def picture(report: Report) -> torch.Tensor:
    """The report's figure, or its words alone: the host does not need matplotlib itself."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(report.plot())
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    except ImportError:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (900, 200), "white")
        text = words(report) + "\nfor the timeline: pip install matplotlib"
        ImageDraw.Draw(image).text((20, 20), text, fill="black")
        pixels = np.asarray(image)
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).unsqueeze(0)
