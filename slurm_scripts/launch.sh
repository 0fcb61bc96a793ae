# shellcheck shell=bash
# What the four train_*.sh share; they source it. `launch SCRIPT CONFIG [FLAGS...]` runs the trainer under torchrun on
# every GPU of every node of the job, and lets one job outlive its time limit:
#
# 1. SLURM sends SIGUSR1 to the batch shell (--signal=B:USR1@120) some two minutes before the limit.
# 2. The shell passes it on to the trainers, which finish their step, save, and leave with exit code 85.
# 3. The shell puts the job back into the queue, and --resume=auto resumes from the checkpoint.
#
# A job is requeued after that signal alone. A crash, `scancel` and a run into the time limit end it.
set -euo pipefail

max_requeues=${MAX_REQUEUES:-100}
preempted=0
step=

launch() {
    local head port code=0
    if ! command -v torchrun >/dev/null; then
        echo "error: torchrun was not found; edit the third of the lines marked 'edit' in the script you submitted" >&2
        return 1
    fi
    # MASTER_ADDR: for clusters whose nodes reach each other by another name than SLURM's.
    head=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    port=$((20000 + SLURM_JOB_ID % 10000)) # one per job, as jobs may share a node
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST; they meet at $head:$port"

    trap preempt USR1
    # The signal reaches every process of the step. torchrun would die of it, so it ignores it, and so do its children
    # until the trainer asks for it. The rendezvous' host is named: torchrun's guess fails where names differ.
    # --wait: once a node has ended, the others have that many seconds to save, or to notice that they are alone.
    # shellcheck disable=SC2016 # these variables are the tasks', not this shell's
    srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=30 bash -c '
        trap "" USR1
        exec torchrun --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --rdzv_conf="is_host=$((SLURM_NODEID == 0))" "$@"
    ' task --nnodes="$SLURM_JOB_NUM_NODES" --max-restarts=0 --rdzv_backend=c10d --rdzv_endpoint="$head:$port" \
        --rdzv_id="$SLURM_JOB_ID" "$1" "$2" --resume=auto "${@:3}" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, but not the trainers
        wait "$step" || true
    done
    wait "$step" || code=$?

    if ((code && preempted && ${SLURM_RESTART_COUNT:-0} < max_requeues)); then
        echo "job $SLURM_JOB_ID was preempted by its time limit; back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    elif ((code && preempted)); then
        echo "job $SLURM_JOB_ID was preempted by its time limit, and has been requeued $max_requeues times already" >&2
    fi
    return "$code"
}

preempt() {
    preempted=1
    # srun hands it to all processes of the step. A trainer that is not listening yet has nothing worth a requeue.
    kill -USR1 "$step" 2>/dev/null || true
}
