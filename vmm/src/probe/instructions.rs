//! The instructions that the probe tries: hand-assembled 64-bit code.
//!
//! A check is to end at its last byte, or jump six bytes beyond it ([`guest`](super::guest) puts the end of a good run
//! there and the end of a bad one behind that). It finds a page of zeroes at 0x9000, and RCX as
//! given to the run.

/// An instruction, or a pair of them, that Linux executes while booting.
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) code: &'static [u8],
}

/// RCX times: `dec rcx; jnz`.
pub(super) const COUNT_DOWN: &[u8] = &[0x48, 0xff, 0xc9, 0x75, 0xfb];

/// Instructions in one round of [`COUNT_DOWN`].
pub(super) const COUNT_DOWN_LENGTH: u64 = 2;

/// What to try, by whether KVM offers XSAVE to guests: Linux uses it then, and does with FXSAVE otherwise.
pub(super) fn needed(xsave: bool) -> Vec<Check> {
    let mut checks = vec![
        Check {
            name: "cmpxchg16b",
            code: &[
                0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
                0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
                0xba, 0x02, 0x00, 0x00, 0x00, // mov edx, 2
                0x48, 0x89, 0x07, // mov [rdi], rax
                0x48, 0x89, 0x57, 0x08, // mov [rdi+8], rdx
                0xbb, 0x03, 0x00, 0x00, 0x00, // mov ebx, 3
                0xb9, 0x04, 0x00, 0x00, 0x00, // mov ecx, 4
                0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
                0x75, 0x13, // jne bad
                0x48, 0x83, 0x3f, 0x03, // cmp qword [rdi], 3
                0x75, 0x0d, // jne bad
                0x48, 0x83, 0x7f, 0x08, 0x04, // cmp qword [rdi+8], 4
                0x75, 0x06, // jne bad
            ],
        },
        Check {
            name: "int3 in long mode",
            code: &[
                0x31, 0xdb, // xor ebx, ebx
                0xcc, // int3: the handler adds one to ebx
                0x83, 0xfb, 0x01, // cmp ebx, 1
                0x75, 0x06, // jne bad
            ],
        },
        Check {
            name: "fxsave",
            code: &[
                0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
                0x48, 0x0f, 0xae, 0x07, // fxsave64 [rdi]
                0x48, 0x0f, 0xae, 0x0f, // fxrstor64 [rdi]
            ],
        },
        Check {
            name: "sse2",
            code: &[
                0xb8, 0x05, 0x00, 0x00, 0x00, // mov eax, 5
                0x66, 0x48, 0x0f, 0x6e, 0xc0, // movq xmm0, rax
                0x66, 0x0f, 0xd4, 0xc0, // paddq xmm0, xmm0
                0x66, 0x48, 0x0f, 0x7e, 0xc3, // movq rbx, xmm0
                0x83, 0xfb, 0x0a, // cmp ebx, 10
                0x75, 0x06, // jne bad
            ],
        },
        Check {
            name: "x87",
            code: &[
                0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
                0xdb, 0xe3, // fninit
                0xd9, 0xe8, // fld1
                0xd8, 0xc0, // fadd st, st
                0xdf, 0x3f, // fistp qword [rdi]
                0x48, 0x83, 0x3f, 0x02, // cmp qword [rdi], 2
                0x75, 0x06, // jne bad
            ],
        },
        Check {
            name: "rdtsc",
            code: &[
                0x0f, 0x31, // rdtsc
                0x89, 0xc3, // mov ebx, eax
                0x09, 0xd3, // or ebx, edx
                0x74, 0x06, // je bad
            ],
        },
        Check {
            name: "cpuid",
            code: &[
                0x31, 0xc0, // xor eax, eax
                0x31, 0xc9, // xor ecx, ecx
                0x0f, 0xa2, // cpuid
                0x85, 0xc0, // test eax, eax: the highest leaf
                0x74, 0x06, // je bad
            ],
        },
        Check {
            name: "rdmsr/wrmsr",
            code: &[
                0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx, KERNEL_GS_BASE
                0xb8, 0x34, 0x12, 0x00, 0x00, // mov eax, 0x1234
                0x31, 0xd2, // xor edx, edx
                0x0f, 0x30, // wrmsr
                0x31, 0xc0, // xor eax, eax
                0x0f, 0x32, // rdmsr
                0x3d, 0x34, 0x12, 0x00, 0x00, // cmp eax, 0x1234
                0x75, 0x06, // jne bad
            ],
        },
        Check {
            name: "swapgs",
            code: &[0x0f, 0x01, 0xf8, 0x0f, 0x01, 0xf8],
        },
        Check {
            name: "popcnt",
            code: &[
                0xb8, 0x0f, 0x0f, 0x00, 0x00, // mov eax, 0xf0f
                0xf3, 0x0f, 0xb8, 0xd8, // popcnt ebx, eax
                0x83, 0xfb, 0x08, // cmp ebx, 8
                0x75, 0x06, // jne bad
            ],
        },
        Check {
            name: "invlpg/mfence",
            code: &[
                0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
                0x0f, 0x01, 0x3f, // invlpg [rdi]
                0x0f, 0xae, 0xf0, // mfence
            ],
        },
        Check {
            name: "rep stosq/movsb",
            code: &[
                0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
                0xb9, 0x10, 0x00, 0x00, 0x00, // mov ecx, 16
                0xb8, 0x07, 0x00, 0x00, 0x00, // mov eax, 7
                0xfc, // cld
                0xf3, 0x48, 0xab, // rep stosq
                0xbe, 0x00, 0x90, 0x00, 0x00, // mov esi, 0x9000
                0xbf, 0x00, 0x91, 0x00, 0x00, // mov edi, 0x9100
                0xb9, 0x80, 0x00, 0x00, 0x00, // mov ecx, 128
                0xf3, 0xa4, // rep movsb
                0x48, 0x83, 0x3c, 0x25, 0x78, 0x91, 0x00, 0x00, 0x07, // cmp qword [0x9178], 7
                0x75, 0x06, // jne bad
            ],
        },
        Check {
            name: "lock xadd",
            code: &[
                0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
                0xc7, 0x07, 0x01, 0x00, 0x00, 0x00, // mov dword [rdi], 1
                0xb8, 0x02, 0x00, 0x00, 0x00, // mov eax, 2
                0xf0, 0x0f, 0xc1, 0x07, // lock xadd [rdi], eax
                0x83, 0x3f, 0x03, // cmp dword [rdi], 3
                0x75, 0x06, // jne bad
            ],
        },
    ];
    if xsave {
        checks.push(Check {
            name: "xsave",
            code: &[
                0x31, 0xc9, // xor ecx, ecx
                0x31, 0xd2, // xor edx, edx
                0xb8, 0x03, 0x00, 0x00, 0x00, // mov eax, x87 and SSE
                0x0f, 0x01, 0xd1, // xsetbv
                0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
                0x48, 0x0f, 0xae, 0x27, // xsave64 [rdi]
                0x48, 0x0f, 0xae, 0x2f, // xrstor64 [rdi]
            ],
        });
    }
    checks
}
