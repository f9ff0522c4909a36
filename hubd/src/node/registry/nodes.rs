//! The nodes themselves, found by id and by name, and how many of them are connected.
//!
//! A command names its node, and a session that begins asks how many there are: with ten thousand of
//! them neither may look at each.

use std::collections::HashMap;

use cortex_shared::ids::NodeId;

use super::Known;
use crate::store::Node;

/// See the module. Names are unique, as in the store.
#[derive(Default)]
pub(super) struct Nodes {
    /// Apart from the table, which has room for twice as many and is copied when it grows.
    known: HashMap<NodeId, Box<Known>>,
    by_name: HashMap<String, NodeId>,
    /// Those that have a session.
    pub(super) online: usize,
}

impl Nodes {
    /// Adds a node; whether it was not known before.
    pub(super) fn add(&mut self, node: Node) -> bool {
        if self.known.contains_key(&node.id) {
            return false;
        }
        self.by_name.insert(node.name.clone(), node.id);
        self.known.insert(node.id, Box::new(Known::new(node)));
        true
    }

    pub(super) fn remove(&mut self, id: NodeId) -> Option<Box<Known>> {
        let known = self.known.remove(&id)?;
        self.drop_name(&known.node.name, id);
        self.online -= usize::from(known.session.is_some());
        Some(known)
    }

    pub(super) fn rename(&mut self, id: NodeId, name: String) {
        let Some(known) = self.known.get_mut(&id) else { return };
        let old = std::mem::replace(&mut known.node.name, name.clone());
        self.drop_name(&old, id);
        self.by_name.insert(name, id);
    }

    /// Takes a name from a node, unless another has got it meanwhile.
    fn drop_name(&mut self, name: &str, id: NodeId) {
        if self.by_name.get(name) == Some(&id) {
            self.by_name.remove(name);
        }
    }

    pub(super) fn get(&self, id: NodeId) -> Option<&Known> {
        self.known.get(&id).map(|known| &**known)
    }

    pub(super) fn get_mut(&mut self, id: NodeId) -> Option<&mut Known> {
        self.known.get_mut(&id).map(|known| &mut **known)
    }

    pub(super) fn named(&self, name: &str) -> Option<&Known> {
        self.get(*self.by_name.get(name)?)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Known> {
        self.known.values().map(|known| &**known)
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Known> {
        self.known.values_mut().map(|known| &mut **known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::fixtures::node;

    #[test]
    fn a_name_leads_to_who_has_it_now() {
        let (a, b) = (node("a"), node("b"));
        let (a_id, b_id) = (a.id, b.id);
        let mut nodes = Nodes::default();
        assert!(nodes.add(a.clone()) && nodes.add(b) && !nodes.add(a));
        let id_of = |nodes: &Nodes, name: &str| nodes.named(name).map(|known| known.node.id);
        // Others took the name before this was told of the change.
        nodes.rename(b_id, "a".to_owned());
        nodes.rename(a_id, "c".to_owned());
        assert_eq!(["a", "b", "c"].map(|name| id_of(&nodes, name)), [Some(b_id), None, Some(a_id)]);
        nodes.remove(b_id).unwrap();
        assert_eq!(id_of(&nodes, "a"), None);
        assert!(nodes.remove(b_id).is_none() && nodes.get(a_id).is_some());
    }
}
