"""What the scripts import from support/.

Nothing here is specific to GANs. support/ has one idea per file.
"""

# a user's mistake: one line on stderr and exit status 2
from support.begin import command
from support.errors import UserError

# options: fields of a dataclass, a command line, and the beginning of every program
from support.options import EditOptions, Options, flag, option
from support.begin import begin

# device: precision, memory format, random numbers, the step at full speed
from support.device import adam, autocast, fast_step, full_precision, own_statistics
from support.device import generating, seed_step, to_device
from support.processes import average_gradients

# data: images decoded once, and gathered in batches
from support.batches import Loader, batches_of_rank, chunks, load_size, spread, turns
from support.store import ImageStore

# runs: the run folder, checkpoints, sample grids
from support.checkpoints import load_network, restore
from support.pictures import save_grid
from support.run import Run

# pictures and label maps as tensors
from support.classes import IGNORED
from support.pictures import class_index, draw, from_bytes, one_hot
from support.pictures import filled, filled_alike, holes_of

# measures, and the baselines beside them
from support.measures import Scores, constant_colors, constant_guesses, copy_verdict
from support.measures import write_evaluation
from support.judge import find_judge

# features of VGG16, for content and style losses
from support.vgg16 import VGG16Features, gram

# generation: --generate and --serve
from support.generate import edit_file, translate_files
