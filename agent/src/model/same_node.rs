//! How two pods of the mesh that share a node speak to each other.

use std::fmt;
use std::str::FromStr;

/// How a workload's connections to and from other pods of its node travel. The stricter of both ends' counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SameNode {
    /// Through the node's kernel, which attests who is at either end, once the agent has decided on the first. The default: what does not
    /// leave the node's kernel has nobody to be hidden from who could not read it in the pods themselves.
    #[default]
    Kernel,
    /// In a tunnel, encrypted, as between nodes.
    Tunnel,
}

impl SameNode {
    /// The label of pods and namespaces, the pod's own before its namespace's.
    pub const LABEL: &'static str = "culvert.dev/same-node";

    /// The words for all of them.
    pub const NAMES: [&'static str; 2] = ["kernel", "tunnel"];
}

/// A word that stands for no way between pods of one node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a way between pods of one node: write kernel or tunnel")]
pub struct UnknownWay(String);

impl FromStr for SameNode {
    type Err = UnknownWay;

    fn from_str(word: &str) -> Result<Self, UnknownWay> {
        match word {
            "kernel" => Ok(Self::Kernel),
            "tunnel" => Ok(Self::Tunnel),
            _ => Err(UnknownWay(word.to_owned())),
        }
    }
}

impl fmt::Display for SameNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Tunnel => "tunnel",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_its_word_and_no_other_word_is_one() {
        for word in SameNode::NAMES {
            assert_eq!(word.parse::<SameNode>().map(|way| way.to_string()), Ok(word.to_owned()));
        }
        for word in ["", "Kernel", "tunnel ", "plain"] {
            assert_eq!(word.parse::<SameNode>(), Err(UnknownWay(word.to_owned())));
        }
    }
}
