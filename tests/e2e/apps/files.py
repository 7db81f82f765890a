"""What programs do with files in a shared folder, given as the argument: attributes, range locks, memory that is shared."""

import fcntl
import mmap
import os
import sys

path = os.path.join(sys.argv[1], "file")
with open(path, "wb") as file:
    file.write(b"a" * 8192)

os.setxattr(path, "user.note", b"one")
os.setxattr(path, "user.note", b"two", os.XATTR_REPLACE)
assert os.getxattr(path, "user.note") == b"two"
assert os.listxattr(path) == ["user.note"], os.listxattr(path)
os.setxattr(path, "user.kept", b"\0\xff" * 500)
os.removexattr(path, "user.note")
try:
    os.getxattr(path, "user.note")
    raise AssertionError("an attribute that was removed is there")
except OSError:
    pass

with open(path, "r+b") as file:
    memory = mmap.mmap(file.fileno(), 8192)
    fcntl.lockf(file, fcntl.LOCK_EX, 4096, 0)
    child = os.fork()
    if child == 0:
        # Locks are a process's own; the other half is free.
        with open(path, "r+b") as own:
            try:
                fcntl.lockf(own, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 100)
                os._exit(1)
            except BlockingIOError:
                pass
            fcntl.lockf(own, fcntl.LOCK_EX | fcntl.LOCK_NB, 4096, 4096)
            os.pwrite(own.fileno(), b"written", 4096)
        memory[0:6] = b"mapped"
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert memory[0:6] == b"mapped" and memory[4096:4103] == b"written", memory[0:7]
    memory.flush()
print("as on any disk")
