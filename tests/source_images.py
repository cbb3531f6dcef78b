"""What the tests of image sources share: reading one image of a source, and writing image files."""

from PIL import Image

from ddpm_dist.data.encode import open_image


def image_of(source, position):
    loaded = source.item(position).load()
    return loaded if isinstance(loaded, Image.Image) else open_image(loaded)


def save(path, mode="RGB", size=(8, 8), colour=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 0 if colour is None else colour).save(path, **options)
    return path
