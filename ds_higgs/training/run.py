"""One rank's part of a training run: its place in the job around set-up and training."""

from functools import partial

from ds_higgs.config import Config
from ds_higgs.job import distributed
from ds_higgs.job.distributed import Ranks
from ds_higgs.job.failures import FailureWatch
from ds_higgs.job.launcher import Launcher, find_launcher
from ds_higgs.job.logs import logger, set_up_logging
from ds_higgs.job.lossy_output import lossy_output
from ds_higgs.job.peers import SILENCE_SECONDS
from ds_higgs.job.run_lock import RunLock
from ds_higgs.job.stopping import Stopped, StopRequests
from ds_higgs.training.set_up import set_up
from ds_higgs.training.trainer import Outcome


def train(config: Config) -> None:
    """Run the training that `config` describes, as this process's rank.

    Raises:
        UserError: where the configuration, the data, the base checkpoint or the checkpoint to resume from is wrong, or
            another job trains in the same folder.
    """
    ranks, launcher = distributed.read_ranks(), find_launcher()
    set_up_logging(ranks.rank, ranks.world_size)
    distributed.complete_environment(ranks)
    with FailureWatch(None, rank=ranks.rank, world_size=ranks.world_size, launcher_is_lost=launcher.is_lost) as watch:
        distributed.init_process_group()
        try:
            with (
                RunLock(config.run.output_dir),
                StopRequests(launcher.is_lost) as stop_requests,  # open until a failure has been told
                watch.in_folder(config.run.output_dir),
                lossy_output(),
            ):
                watch.share(stop_requests)
                _train(config, ranks, launcher, watch, stop_requests)
        finally:
            distributed.destroy_process_group()


def _train(config: Config, ranks: Ranks, launcher: Launcher, watch: FailureWatch, stop_requests: StopRequests) -> None:
    try:
        trainer = set_up(config, ranks, stop_requests)
        watch.checks.append(partial(trainer.train_loader.workers.stopped, looks=round(SILENCE_SECONDS)))
        outcome = trainer.fit()
    except Stopped:
        outcome = Outcome.STOPPED
    if outcome is Outcome.STOPPED:
        reason = stop_requests.reason or stop_requests.heard
        logger.info("stopped (%s); to go on: %s", reason, launcher.resume_command())
