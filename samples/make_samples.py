"""Makes landscape.jpg and speech.wav, the same every time: `.venv/bin/python samples/make_samples.py`."""

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFilter

HERE = Path(__file__).parent
ORIENTATION = 0x0112  # the EXIF tag; 6: "turn by 90 degrees clockwise to look at it", as phones write it


def landscape() -> None:
    """Hills at dusk, 1500 x 1000, stored lying on its side: a thumbnail that ignores EXIF would stand on edge."""
    width, height = 1500, 1000
    rows = np.linspace(0, 1, height)[:, None, None]
    dusk, horizon = np.array([24, 28, 74]), np.array([250, 165, 96])
    picture = np.broadcast_to(dusk + (horizon - dusk) * rows**1.6, (height, width, 3)).astype(np.uint8)
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    draw.ellipse((980, 470, 1140, 630), fill=(255, 226, 170))
    x = np.arange(0, width + 1, 10)
    for hill in range(5):
        ridge = (
            560 + 80 * hill + (70 - 9 * hill) * np.sin(x / (170 + 35 * hill) + 1.7 * hill) + 14 * np.sin(x / 31 + hill)
        )
        shade = tuple(int(c * (1 - hill / 5)) for c in (104, 74, 104))
        draw.polygon([(0, height), *zip(x.tolist(), ridge.tolist(), strict=True), (width, height)], fill=shade)
    image = image.filter(ImageFilter.GaussianBlur(1.2)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image.save(HERE / "landscape.jpg", quality=85, exif=exif)


def speech() -> None:
    """Twelve seconds like somebody talking: syllables of a voice at about 120 Hz, three pauses of digital silence."""
    rate, rng = 16_000, np.random.default_rng(7)
    pauses = ((2.6, 3.4), (6.1, 7.3), (9.8, 10.4))
    time = np.arange(12 * rate) / rate
    pitch = 120 + 18 * np.sin(2 * np.pi * 0.35 * time) + 6 * np.sin(2 * np.pi * 2.1 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(np.sin(n * phase) / n**1.2 for n in range(1, 16))
    syllables = np.clip(np.sin(2 * np.pi * 2.2 * time) + 0.35, 0, 1) ** 0.7
    sound = (voice + 0.25 * rng.standard_normal(len(time))) * syllables
    for begin, end in pauses:
        sound[(time >= begin) & (time < end)] = 0
    soundfile.write(HERE / "speech.wav", 0.6 * sound / np.abs(sound).max(), rate, subtype="PCM_16")


if __name__ == "__main__":
    landscape()
    speech()
