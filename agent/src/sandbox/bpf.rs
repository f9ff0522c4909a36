//! From a list of denied system calls to a program of the kernel's packet filter.
//!
//! The numbers are found by halves: what a filter costs when it is loaded, where the kernel walks
//! through it once for every system call there is, and when it runs, follows from the way that an
//! ordinary call takes through it. A list, compared one by one, takes ten times as long.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

/// What a half of an argument has to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    Is(u32),
    IsNot(u32),
    /// At least one of these bits is set.
    Any(u32),
    /// These bits are as in the value.
    Masked {
        mask: u32,
        value: u32,
    },
}

/// Of an argument. Flags and numbers are 32 bits wide for the kernel, and so they must be for the filter:
/// the upper half of their register is the caller's to fill. A pointer is none only if both halves are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    Lower,
    Upper,
}

/// One argument, counted from 0, and what it has to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) argument: u8,
    pub(super) half: Half,
    pub(super) test: Test,
}

/// Denies a call if all of this holds.
pub(super) type Rule = Vec<Condition>;

/// Denied calls by number: by one of the rules, or in any case if there are none.
pub(super) type Rules = BTreeMap<u32, Vec<Rule>>;

/// What the kernel calls this architecture.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xC000_00B7;

/// The first number that nobody has looked at here: the last one known is `file_setattr` of Linux 6.17.
/// What comes later does not exist, for a program as on an older kernel, until it has been looked at; nor
/// does the second set of numbers of x86-64, x32, which begins far above and would be missed by a list of
/// the ordinary ones.
pub(super) const FIRST_UNKNOWN: u32 = 470;

// Of `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// The program that answers denied calls with `errno`, and all others with success.
pub(super) fn program(rules: &Rules, errno: i32) -> BpfProgram {
    let mut code = vec![
        statement(LOAD, ARCHITECTURE_AT),
        jump(JUMP_IF_EQUAL, ARCHITECTURE, 1, 0),
        statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        statement(LOAD, NUMBER_AT),
        jump(JUMP_IF_AT_LEAST, FIRST_UNKNOWN, 0, 1),
        denial(libc::ENOSYS),
    ];
    code.extend(halves(&ranges(rules), errno));
    code
}

/// Numbers that follow each other and are denied in any case are one range.
struct Range<'a> {
    first: u32,
    last: u32,
    rules: &'a [Rule],
}

fn ranges(rules: &Rules) -> Vec<Range<'_>> {
    let mut ranges: Vec<Range<'_>> = Vec::new();
    for (&number, rules) in rules {
        match ranges.last_mut() {
            Some(last) if last.rules.is_empty() && rules.is_empty() && last.last + 1 == number => {
                last.last = number;
            }
            _ => ranges.push(Range { first: number, last: number, rules }),
        }
    }
    ranges
}

fn halves(ranges: &[Range<'_>], errno: i32) -> BpfProgram {
    let (first, second) = ranges.split_at(ranges.len() / 2);
    match (first, second) {
        (_, []) => vec![allowance()],
        ([], [range, ..]) => one(range, errno),
        (_, [pivot, ..]) => {
            let (below, above) = (halves(first, errno), halves(second, errno));
            let mut code = match u8::try_from(below.len()) {
                Ok(over) => vec![jump(JUMP_IF_AT_LEAST, pivot.first, over, 0)],
                // The short jumps do not reach that far.
                Err(_) => {
                    vec![jump(JUMP_IF_AT_LEAST, pivot.first, 0, 1), statement(JUMP, length(&below))]
                }
            };
            code.extend(below.into_iter().chain(above));
            code
        }
    }
}

/// For a number that is neither below nor above the neighbours of this range.
fn one(range: &Range<'_>, errno: i32) -> BpfProgram {
    let mut code = if range.first == range.last {
        vec![jump(JUMP_IF_EQUAL, range.first, 1, 0), allowance()]
    } else {
        vec![
            jump(JUMP_IF_AT_LEAST, range.first, 0, 1),
            jump(JUMP_IF_AT_LEAST, range.last + 1, 0, 1),
            allowance(),
        ]
    };
    if range.rules.is_empty() {
        code.push(denial(errno));
    } else {
        code.extend(range.rules.iter().flat_map(|rule| of_rule(rule, errno)));
        code.push(allowance());
    }
    code
}

/// Goes on behind itself if the rule does not hold.
fn of_rule(rule: &Rule, errno: i32) -> BpfProgram {
    let mut code = vec![denial(errno)];
    for condition in rule.iter().rev() {
        // Rules are short: a longer one would be a mistake that the tests show.
        let past = u8::try_from(code.len()).unwrap_or(u8::MAX);
        let half = if condition.half == Half::Upper { 4 } else { 0 };
        let at = ARGUMENTS_AT + 8 * u32::from(condition.argument) + half;
        let mut test = vec![statement(LOAD, at)];
        test.extend(match condition.test {
            Test::Is(value) => vec![jump(JUMP_IF_EQUAL, value, 0, past)],
            Test::IsNot(value) => vec![jump(JUMP_IF_EQUAL, value, past, 0)],
            Test::Any(bits) => vec![jump(JUMP_IF_ANY_BIT, bits, 0, past)],
            Test::Masked { mask, value } => {
                vec![statement(AND, mask), jump(JUMP_IF_EQUAL, value, 0, past)]
            }
        });
        code.splice(0..0, test);
    }
    code
}

fn length(code: &BpfProgram) -> u32 {
    u32::try_from(code.len()).unwrap_or(u32::MAX)
}

fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn allowance() -> sock_filter {
    statement(RETURN, libc::SECCOMP_RET_ALLOW)
}

fn denial(errno: i32) -> sock_filter {
    statement(RETURN, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would do: the answer of a program, and how many steps it took.
    pub(in super::super) fn answer(
        program: &[sock_filter],
        architecture: u32,
        number: u32,
        arguments: [u64; 6],
    ) -> (u32, usize) {
        let word = |at: u32| match at {
            NUMBER_AT => number,
            ARCHITECTURE_AT => architecture,
            at => {
                let argument = arguments[usize::try_from((at - ARGUMENTS_AT) / 8).unwrap()];
                let half = if at.is_multiple_of(8) { argument } else { argument >> 32 };
                u32::try_from(half & 0xFFFF_FFFF).unwrap()
            }
        };
        let (mut at, mut value, mut steps) = (0, 0, 0);
        loop {
            let step = &program[at];
            steps += 1;
            let either = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
            at += 1 + match step.code {
                LOAD => {
                    value = word(step.k);
                    0
                }
                AND => {
                    value &= step.k;
                    0
                }
                JUMP => usize::try_from(step.k).unwrap(),
                JUMP_IF_EQUAL => either(value == step.k),
                JUMP_IF_AT_LEAST => either(value >= step.k),
                JUMP_IF_ANY_BIT => either(value & step.k != 0),
                RETURN => return (step.k, steps),
                code => panic!("no such instruction: {code:#x}"),
            };
        }
    }

    /// The answer of [`program`] for this architecture.
    pub(in super::super) fn here(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> u32 {
        answer(program, ARCHITECTURE, number, arguments).0
    }

    fn holds(condition: Condition, arguments: [u64; 6]) -> bool {
        let argument = arguments[usize::from(condition.argument)];
        let half = if condition.half == Half::Upper { argument >> 32 } else { argument };
        let argument = u32::try_from(half & 0xFFFF_FFFF).unwrap();
        match condition.test {
            Test::Is(value) => argument == value,
            Test::IsNot(value) => argument != value,
            Test::Any(bits) => argument & bits != 0,
            Test::Masked { mask, value } => argument & mask == value,
        }
    }

    fn any_test() -> impl Strategy<Value = Test> {
        prop_oneof![
            (0_u32..8).prop_map(Test::Is),
            (0_u32..8).prop_map(Test::IsNot),
            (0_u32..8).prop_map(Test::Any),
            (0_u32..8, 0_u32..8).prop_map(|(mask, value)| Test::Masked { mask, value }),
        ]
    }

    fn any_rules() -> impl Strategy<Value = Rules> {
        let half = prop_oneof![Just(Half::Lower), Just(Half::Upper)];
        let condition = (0_u8..6, half, any_test()).prop_map(|(argument, half, test)| Condition {
            argument,
            half,
            test,
        });
        let rule = proptest::collection::vec(condition, 1..5);
        let rules = proptest::collection::vec(rule, 0..4);
        proptest::collection::btree_map(0..FIRST_UNKNOWN, rules, 0..150)
    }

    proptest! {
        #[test]
        fn a_program_says_what_its_rules_say(
            rules in any_rules(),
            arguments in any::<[u64; 6]>(),
            small in any::<bool>(),
        ) {
            let arguments = arguments.map(|value| if small { value & 0x0000_0007_0000_0007 } else { value });
            let program = program(&rules, libc::EPERM);
            for number in 0..FIRST_UNKNOWN {
                let denied = rules.get(&number).is_some_and(|rules| {
                    rules.is_empty() || rules.iter().any(|rule| {
                        rule.iter().all(|condition| holds(*condition, arguments))
                    })
                });
                let wanted = if denied { denial(libc::EPERM).k } else { allowance().k };
                prop_assert_eq!(here(&program, number, arguments), wanted, "call {}", number);
            }
        }
    }

    #[test]
    fn another_architecture_ends_the_process() {
        let program = program(&Rules::new(), libc::EPERM);
        // The 32-bit interfaces of both, and the other of the two.
        for architecture in [0x4000_0003, 0x4000_0028, 0xC000_003E, 0xC000_00B7] {
            if architecture != ARCHITECTURE {
                let (found, _) = answer(&program, architecture, 1, [0; 6]);
                assert_eq!(found, libc::SECCOMP_RET_KILL_PROCESS, "{architecture:#x}");
            }
        }
        assert_eq!(here(&program, 1, [0; 6]), libc::SECCOMP_RET_ALLOW);
    }

    #[test]
    fn numbers_that_nobody_has_looked_at_do_not_exist_nor_does_the_second_set() {
        let x32 = 0x4000_0000;
        let program = program(&Rules::new(), libc::EPERM);
        assert_eq!(here(&program, FIRST_UNKNOWN - 1, [0; 6]), allowance().k);
        for number in [FIRST_UNKNOWN, FIRST_UNKNOWN + 100, x32, x32 | 39, u32::MAX] {
            assert_eq!(here(&program, number, [0; 6]), denial(libc::ENOSYS).k);
        }
    }
}
