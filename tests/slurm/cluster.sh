#!/usr/bin/env bash
# A SLURM cluster of two nodes on one machine: munged, slurmctld and two slurmd as ordinary processes of the caller, on
# loopback, with every key, socket, log and state file under one folder. Works as root or a user, in containers too.
#
# $ eval "$(tests/slurm/cluster.sh start /tmp/cluster)"   # sets SLURM_CONF, which sbatch, squeue, ... obey
# $ sinfo
# $ tests/slurm/cluster.sh stop /tmp/cluster              # cancels the jobs and ends every process; logs stay
#
# Made for tests: no accounting, no cgroups, no limits on resources, and timers of seconds instead of minutes.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

usage="usage: $0 start|stop DIR"
action=${1:?$usage}
dir=$(realpath -m "${2:?$usage}")
conf=$dir/slurm.conf
nodes=(n1 n2)
nodes_up_within=30 # seconds

say() { echo "cluster.sh: $*" >&2; }

# The first of COUNT ports in a row that nobody listens on. Below 20000: the jobs use those above.
free_ports() { # COUNT
    local first port try
    for try in {1..50}; do
        first=$((12000 + (RANDOM + try) % 8000))
        for ((port = first; port < first + $1; port++)); do
            (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
        done
        echo "$first"
        return
    done
    say "no free ports between 12000 and 20000"
    return 1
}

write_conf() { # FIRST_PORT
    local user host version i
    user=$(id -un)
    host=$(uname -n)
    host=${host%%.*}
    {
        echo "ClusterName=loopback"
        echo "SlurmctldHost=$host(127.0.0.1)"
        echo "SlurmctldPort=$1"
        echo "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" # listen on loopback alone
        echo "SlurmUser=$user"
        echo "SlurmdUser=$user"
        # A requeued job waits until the credentials of its last start have expired: 120 s by default.
        echo "AuthType=auth/munge"
        echo "CredType=cred/munge"
        echo "AuthInfo=socket=$dir/munge.socket,cred_expire=10"
        echo "StateSaveLocation=$dir/state"
        echo "SlurmdSpoolDir=$dir/spool-%n"
        echo "SlurmctldPidFile=$dir/slurmctld.pid"
        echo "SlurmdPidFile=$dir/slurmd-%n.pid"
        # All processes of a step count as its own, also those that torchrun puts into a session of their own.
        echo "ProctrackType=proctrack/linuxproc"
        echo "SwitchType=switch/none"
        echo "MpiDefault=none"
        echo "JobAcctGatherType=jobacct_gather/none"
        echo "AccountingStorageType=accounting_storage/none"
        echo "SelectType=select/cons_tres"
        echo "SelectTypeParameters=CR_CPU"
        echo "SchedulerType=sched/builtin"
        echo "SchedulerParameters=sched_interval=1,batch_sched_delay=0"
        echo "JobRequeue=1"
        echo "PreemptMode=off"
        echo "ReturnToService=2"
        echo "KillWait=5"
        echo "InactiveLimit=0"
        echo "MinJobAge=300"
        echo "CompleteWait=0"
        echo "SlurmctldTimeout=60"
        echo "SlurmdTimeout=60"
        # The nodes claim what the scripts ask for and the machine hasn't. Their GPUs are names for /dev/null.
        echo "SlurmdParameters=config_overrides"
        echo "GresTypes=gpu"
        for i in "${!nodes[@]}"; do
            echo "NodeName=${nodes[i]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$(($1 + 1 + i)) CPUs=64 Gres=gpu:8"
        done
        echo "PartitionName=gpu Nodes=$(IFS=,; echo "${nodes[*]}") Default=YES MaxTime=INFINITE State=UP"
    } >"$conf"
    echo "NodeName=$(IFS=,; echo "${nodes[*]}") Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
    for i in {0..7}; do ln -sf /dev/null "$dir/gpu$i"; done
    version=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
    if [[ $(printf '%s\n' 23.11 "$version" | sort -V | head -n 1) == 23.11 ]]; then
        echo "CgroupPlugin=disabled" >"$dir/cgroup.conf" # earlier versions don't ask for cgroups at all here
    fi
}

run() { # NAME COMMAND...: a daemon, whose end `stop` is sure to find by the mark in its environment
    LOOPBACK_CLUSTER=$dir SLURM_CONF=$conf setsid "${@:2}" >"$dir/$1.log" 2>&1 </dev/null &
}

up() { # whether all nodes wait for jobs
    [[ $(SLURM_CONF=$conf timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | wc -l) == "${#nodes[@]}" ]]
}

start() {
    local node deadline port
    if ((${#dir} > 85)); then
        say "error: $dir is too long for a socket's path; choose a folder nearer to the root"
        exit 1
    fi
    if [[ -n $(processes) ]]; then
        say "error: a cluster is already running under $dir; stop it first: $0 stop $dir"
        exit 1
    fi
    umask 022
    mkdir -p "$dir"
    rm -rf "$dir/state" "$dir"/spool-* "$dir"/munge.socket*
    mkdir -p "$dir/state" "${nodes[@]/#/$dir/spool-}"
    port=$(free_ports $((1 + ${#nodes[@]})))
    write_conf "$port"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    trap 'say "error: the cluster did not start; the logs are in $dir"; tail -n 5 "$dir"/*.log >&2 || true; stop' EXIT
    # --force: the folder may be private, and the caller is the only user of this daemon.
    run munged munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munged.pid" --seed-file="$dir/munge.seed"
    for ((deadline = SECONDS + 10; SECONDS < deadline; )); do
        [[ -S $dir/munge.socket ]] && break
        sleep 0.1
    done
    run slurmctld slurmctld -D -i -f "$conf"
    for node in "${nodes[@]}"; do
        run "slurmd-$node" slurmd -D -N "$node" -f "$conf"
    done
    for ((deadline = SECONDS + nodes_up_within; SECONDS < deadline; )); do
        (($(jobs -rp | wc -l) == 2 + ${#nodes[@]})) || break # one of the daemons has given up
        if up; then
            trap - EXIT
            say "nodes ${nodes[*]} are up; logs in $dir"
            echo "export SLURM_CONF=$conf"
            return
        fi
        sleep 0.2
    done
    exit 1
}

processes() { # this cluster's daemons and what their jobs left: everything that carries its mark in the environment
    {
        grep -lszxF "LOOPBACK_CLUSTER=$dir" /proc/[0-9]*/environ || true
        # A job has its submitter's environment, to which SLURM adds these two.
        grep -lszxF "SLURM_CONF=$conf" /proc/[0-9]*/environ | xargs -r grep -lsz '^SLURM_JOB_ID=' || true
    } | grep -oE '[0-9]+' | sort -u
}

gone_within() { # SECONDS: whether no process is left by then
    local deadline
    for ((deadline = SECONDS + $1; SECONDS <= deadline; )); do
        [[ -z $(processes) ]] && return 0
        sleep 0.2
    done
    return 1
}

stop() {
    local deadline signal
    trap - EXIT
    export SLURM_CONF=$conf
    if [[ -n $(processes) ]] && timeout 5 scontrol ping >/dev/null 2>&1; then
        timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
        for ((deadline = SECONDS + 10; SECONDS < deadline; )); do
            [[ -z $(timeout 5 squeue -h -t R,CG 2>/dev/null) ]] && break
            sleep 0.2
        done
    fi
    for signal in TERM KILL; do
        # shellcheck disable=SC2046 # one word per process
        kill -s "$signal" $(processes) 2>/dev/null || true
        gone_within 10 && break
    done
    if [[ -n $(processes) ]]; then
        say "error: these processes under $dir could not be ended: $(processes | xargs)"
        exit 1
    fi
    say "stopped; nothing of $dir is running"
}

case $action in
start)
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" >/dev/null || { say "error: no $program here; run tests/install.sh slurm"; exit 1; }
    done
    start
    ;;
stop) stop ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
