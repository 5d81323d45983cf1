import pytest
from mining_world import CONFIG, NUM_IMAGES, SHARD_SIZE, World, draw_scene, save_checkpoint

from orl_fast.shards import write_shards


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    images = folder / "scenes"
    images.mkdir()
    for i in range(NUM_IMAGES):
        draw_scene(i).save(images / f"scene{i:03d}.jpg", quality=90)
    write_shards([images], folder / "shards" / "scenes", shard_size=SHARD_SIZE, num_workers=1)
    checkpoint = save_checkpoint(folder / "runs" / "scenes" / "byol" / "checkpoint.pt", CONFIG)
    return World(folder=folder, images=images, shards=folder / "shards" / "scenes", checkpoint=checkpoint, config=CONFIG)
