#!/bin/bash
# A training as a Slurm job that goes on after pre-emption and time limits until it is done:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 examples/slurm/requeue.sh \
#       --recipe in1k-vitb16 data.path=/data/imagenet/train run.dir=/shared/runs/vitb16
#
# Submit it from the folder of ds.json, with the environment of njepa active; options of sbatch
# win over the lines below. All arguments go to the trainer. Set run.dir to a folder of all nodes.

#SBATCH --job-name=njepa
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGUSR1 comes 120 s before the time limit; run.grace_s below is less, for the end of the job.
#SBATCH --signal=B:USR1@120

MAX_RESTARTS=1000

srun python -m njepa.train "$@" run.resume=true run.grace_s=90 &
step=$!
asked=no
# srun hands SIGUSR1 on to every task; at SIGTERM it would kill them. After SIGTERM alone (scancel,
# pre-emption) nothing is requeued here: a job that is pre-empted is requeued by Slurm itself.
trap 'asked=yes; kill -USR1 "$step" 2>/dev/null' USR1
trap 'kill -USR1 "$step" 2>/dev/null' TERM

while kill -0 "$step" 2>/dev/null; do wait "$step"; done # a trap ends a wait, not the step
wait "$step"
status=$?

# The statuses that say "stopped as asked, can go on" (docs/cli.md).
if [ "$asked" = yes ] && { [ "$status" -eq 75 ] || [ "$status" -eq 76 ]; }; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "restarted $SLURM_RESTART_COUNT times: given up; submit again to go on" >&2
    else
        # This ends the job, and Slurm starts the script again when there is room.
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
