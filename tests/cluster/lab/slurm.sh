# Sourced by up.sh: slurmctld and munged on head, a slurmd in each host. Four pretended CPUs and two pretended GPUs each.
slurm=$folder/slurm
mkdir -p "$slurm"/{state,log,spool,munge,dev}
chmod 755 "$slurm" "$slurm/munge"

{
    cat <<END
ClusterName=lab
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential has expired, two minutes by default
AuthInfo=socket=$slurm/munge/socket,cred_expire=5
StateSaveLocation=$slurm/state
SlurmctldPidFile=$slurm/slurmctld.pid
SlurmctldLogFile=$slurm/log/slurmctld.log
SlurmdPidFile=$slurm/%n.pid
SlurmdSpoolDir=$slurm/spool/%n
SlurmdLogFile=$slurm/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/${PROCTRACK:-linuxproc}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdTimeout=${SLURMD_TIMEOUT:-30}
GresTypes=gpu
END
    for name in "${host_names[@]}"; do echo "NodeName=$name CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN"; done
    echo "PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5"
    echo "PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
} >"$slurm/slurm.conf"
printf 'CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n' >"$slurm/cgroup.conf"
# plain devices stand in for those of GPUs, so that --gpus-per-node is granted
for number in 0 1; do mknod "$slurm/dev/gpu$number" c 1 3; done
echo "Name=gpu File=$slurm/dev/gpu[0-1]" >"$slurm/gres.conf"
export SLURM_CONF=$slurm/slurm.conf

head -c 128 /dev/urandom >"$slurm/munge/key"
chmod 600 "$slurm/munge/key"
munged --force --key-file="$slurm/munge/key" --socket="$slurm/munge/socket" --pid-file="$slurm/munge/pid" \
    --seed-file="$slurm/munge/seed" --log-file="$slurm/munge/log" 2>/dev/null
slurmctld -c
for name in "${host_names[@]}"; do
    mkdir -p "$slurm/spool/$name"
    on "$name" slurmd -N "$name"
done
idle() { timeout 3 sinfo -h -N -p low -t idle -o %N 2>/dev/null | sort -u | wc -l; }
for _ in $(seq 1 150); do
    [ "$(idle)" != "$hosts" ] || break
    sleep 0.1
done
[ "$(idle)" = "$hosts" ] || { echo "SLURM did not come up" >&2; tail -n 20 "$slurm"/log/*.log >&2; exit 1; }
