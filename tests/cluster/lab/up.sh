#!/usr/bin/env bash
# up.sh FOLDER HOSTS: real hosts and a real SLURM on one machine, out of namespaces. As root, as the first process of
#
#     unshare --net --pid --fork --kill-child --mount --mount-proc --uts --ipc up.sh FOLDER HOSTS
#
# Each host node1, node2, … has its own address, host name, /dev/shm and sshd; "head" is where this runs. No interface,
# key or file of the machine is changed: what is covered is covered in this mount namespace. Prints "ready" when SLURM
# has every node idle, and ends, with everything it started, when its standard input ends.
#
# PROCTRACK=cgroup   as real clusters have it: a signal reaches the direct child of slurmstepd only (default linuxproc)
# SLURMD_TIMEOUT=10  seconds without a word after which a node is down
set -euo pipefail
folder=$1 hosts=$2 here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
host_names=()
for i in $(seq 1 "$hosts"); do host_names+=("node$i"); done

network() {
    ip link set lo up
    ip link add br0 type bridge
    ip addr add 10.77.0.254/24 dev br0
    ip link set br0 up
    hostname head
    { echo "127.0.0.1 localhost"; echo "10.77.0.254 head"; } >"$folder/hosts"
    for i in $(seq 1 "$hosts"); do echo "10.77.0.$i node$i" >>"$folder/hosts"; done
    mount --bind "$folder/hosts" /etc/hosts
    # no name server: torch looks its peers up backwards and would wait for one that cannot be reached
    : >"$folder/resolv.conf"
    mount --bind "$folder/resolv.conf" /etc/resolv.conf
}

keys() {
    # ssh takes the home of the password file, not $HOME
    ssh=$(getent passwd "$(id -u)" | cut -d: -f6)/.ssh
    mkdir -p "$ssh"
    mount -t tmpfs -o mode=700 tmpfs "$ssh"
    ssh-keygen -q -t ed25519 -N "" -f "$ssh/id_ed25519"
    cp "$ssh/id_ed25519.pub" "$ssh/authorized_keys"
    ssh-keygen -q -t ed25519 -N "" -f "$folder/hostkey"
    printf 'Host *\n  LogLevel ERROR\n' >"$ssh/config"
    for i in $(seq 1 "$hosts"); do echo "node$i,10.77.0.$i $(cut -d" " -f1,2 "$folder/hostkey.pub")"; done >"$ssh/known_hosts"
    chmod 600 "$ssh"/*
}

# $1: number of the host. Its first process is its sshd, whose id stands in FOLDER/NAME.pid.
host() {
    local name=node$1
    ip netns add "$name"
    ip link add "ve$1" type veth peer name eth0 netns "$name"
    ip link set "ve$1" master br0 up
    ip -n "$name" link set lo up
    ip -n "$name" addr add "10.77.0.$1/24" dev eth0
    ip -n "$name" link set eth0 up
    cat >"$folder/$name.sshd" <<END
HostKey $folder/hostkey
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
AuthorizedKeysFile $ssh/authorized_keys
PidFile none
MaxStartups 100
END
    nsenter --net="/run/netns/$name" unshare --uts --mount --ipc bash -c "
        hostname $name
        mount -t tmpfs -o mode=1777 tmpfs /dev/shm
        echo \$\$ >$folder/$name.pid
        exec /usr/sbin/sshd -D -e -f $folder/$name.sshd" 2>"$folder/$name.sshd.log" </dev/null &
}

on() { # NAME COMMAND…
    local name=$1
    shift
    nsenter -t "$(cat "$folder/$name.pid")" --net --uts --mount --ipc --wd="$folder" "$@"
}

chmod 755 "$folder"
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/sshd
network
keys
for i in $(seq 1 "$hosts"); do host "$i"; done
for name in "${host_names[@]}"; do
    for _ in $(seq 1 100); do
        (exec 3<>"/dev/tcp/$name/22") 2>/dev/null && break
        sleep 0.05
    done
done
. "$here/slurm.sh"
echo ready
cat >/dev/null
