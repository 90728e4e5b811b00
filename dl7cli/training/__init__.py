"""Training: the loop, its run folder, resuming and evaluation."""

from dl7cli.training.comparison import compare
from dl7cli.training.evaluation import average, evaluate
from dl7cli.training.listener import Epoch, Listener, Plan, Step
from dl7cli.training.session import resume, train
from dl7cli.training.signals import Interrupted
