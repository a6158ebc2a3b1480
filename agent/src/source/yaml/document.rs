//! One document: its head is read first, then the whole straight into the type that the head
//! names, because only so do errors know their line.

use std::{cell::Cell, cell::RefCell, fmt};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{
    Chunk, Format, Located, Manifest, ManifestError, depth,
    head::{Class, DocumentHead, Head},
};
use crate::objects::{InvalidObject, Kind, Object, ObjectKey};

/// Bad items after which the rest of a list is not looked at: each costs another pass.
const BAD_ITEMS_MAX: usize = 16;

/// Reads one document into `manifest`.
pub(super) fn read(chunk: Chunk<'_>, format: Format, manifest: &mut Manifest) {
    if format == Format::Yaml
        && let Some(line) = depth::line_too_deep(chunk.text)
    {
        return manifest
            .errors
            .push(Failure::too_deep(chunk, line).at(chunk, None));
    }
    let (head, items) = match read_head(chunk, format) {
        Ok(head) => head,
        Err(failure) => return manifest.errors.push(failure.at(chunk, None)),
    };
    if let Some(mut items) = items
        && head.is_list()
    {
        items.iter_mut().for_each(|item| item.inherit(&head));
        return read_list(chunk, format, &items, manifest);
    }
    let kind = match head.class() {
        Class::Used(kind) => kind,
        Class::Ignored(what) => return manifest.ignored.push(what),
        Class::Bad(cause) => return manifest.errors.push(Failure::whole(cause).at(chunk, None)),
    };
    match deserialize(chunk, format, ObjectSeed(kind)) {
        Ok(Ok(object)) => manifest.objects.push(Located {
            line: chunk.line(),
            object,
        }),
        Ok(Err(invalid)) => manifest.errors.push(Failure::invalid(&invalid, chunk)),
        Err(failure) => manifest.errors.push(failure.at(chunk, head.key(kind))),
    }
}

fn read_head(chunk: Chunk<'_>, format: Format) -> Result<(Head, Option<Vec<Head>>), Failure> {
    match deserialize(chunk, format, Typed::<DocumentHead>::NEW) {
        Ok(head) => Ok(head.split()),
        // Some custom resource may have `items` of its own kind.
        Err(failure) => match deserialize(chunk, format, Typed::<Head>::NEW) {
            Ok(head) if matches!(head.class(), Class::Ignored(_)) && !head.is_list() => {
                Ok((head, None))
            }
            _ => Err(failure),
        },
    }
}

/// Reads the items one by one. Decoding stops at the first that does not fit its type: it is
/// noted, and the list is read again without it.
fn read_list(chunk: Chunk<'_>, format: Format, heads: &[Head], manifest: &mut Manifest) {
    let mut plan: Vec<Option<Kind>> = Vec::with_capacity(heads.len());
    for (index, head) in heads.iter().enumerate() {
        plan.push(match head.class() {
            Class::Used(kind) => Some(kind),
            Class::Ignored(what) => {
                manifest.ignored.push(what);
                None
            }
            Class::Bad(cause) => {
                let cause = format!("items[{index}]: {cause}");
                manifest.errors.push(Failure::whole(cause).at(chunk, None));
                None
            }
        });
    }
    for bad_items in 1.. {
        let (index, objects) = (Cell::new(0), RefCell::new(Vec::new()));
        let seed = ListSeed {
            plan: &plan,
            index: &index,
            objects: &objects,
        };
        let result = deserialize(chunk, format, seed);
        let index = index.get();
        if let Err(failure) = &result
            && let Some(planned) = plan.get_mut(index)
            && let Some(kind) = planned.take()
        {
            let key = heads[index].key(kind);
            manifest.errors.push(failure.clone().at(chunk, key));
            if bad_items < BAD_ITEMS_MAX {
                continue;
            }
            let cause = format!(
                "items[{}] and later are not read: too many errors",
                index + 1
            );
            manifest.errors.push(Failure::whole(cause).at(chunk, None));
        } else if let Err(failure) = result {
            manifest.errors.push(failure.at(chunk, None));
        }
        for object in objects.take() {
            match object {
                Ok(object) => manifest.objects.push(Located {
                    line: chunk.line(),
                    object,
                }),
                Err(invalid) => manifest.errors.push(Failure::invalid(&invalid, chunk)),
            }
        }
        return;
    }
}

/// Decodes an object of a kind that is known.
#[derive(Clone, Copy)]
struct ObjectSeed(Kind);

impl<'de> DeserializeSeed<'de> for ObjectSeed {
    type Value = Result<Object, InvalidObject>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        Ok(match self.0 {
            Kind::Service => core::Service::deserialize(from)?
                .try_into()
                .map(Object::Service),
            Kind::EndpointSlice => discovery::EndpointSlice::deserialize(from)?
                .try_into()
                .map(Object::EndpointSlice),
            Kind::Node => core::Node::deserialize(from)?.try_into().map(Object::Node),
            Kind::Pod => core::Pod::deserialize(from)?.try_into().map(Object::Pod),
            Kind::Namespace => core::Namespace::deserialize(from)?
                .try_into()
                .map(Object::Namespace),
        })
    }
}

/// Decodes the items of a list as planned; `None` passes over one.
#[derive(Clone, Copy)]
struct ListSeed<'a> {
    plan: &'a [Option<Kind>],
    /// The item at work, for the caller to see after an error.
    index: &'a Cell<usize>,
    objects: &'a RefCell<Vec<Result<Object, InvalidObject>>>,
}

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(field) = map.next_key::<String>()? {
            if field == "items" {
                map.next_value_seed(ItemsSeed(self))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct ItemsSeed<'a>(ListSeed<'a>);

impl<'de> DeserializeSeed<'de> for ItemsSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ItemsSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the items of a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        // The text may be read a second time, for the lines of an error.
        self.0.objects.borrow_mut().clear();
        for (index, kind) in self.0.plan.iter().enumerate() {
            self.0.index.set(index);
            match kind {
                Some(kind) => {
                    let object = items.next_element_seed(ObjectSeed(*kind))?;
                    self.0.objects.borrow_mut().extend(object);
                }
                None => {
                    items.next_element::<IgnoredAny>()?;
                }
            }
        }
        self.0.index.set(self.0.plan.len());
        Ok(())
    }
}

/// A type as a seed.
struct Typed<T>(std::marker::PhantomData<T>);

impl<T> Typed<T> {
    const NEW: Self = Self(std::marker::PhantomData);
}

impl<T> Clone for Typed<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Typed<T> {}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Typed<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<T, D::Error> {
        T::deserialize(from)
    }
}

fn deserialize<S, T>(chunk: Chunk<'_>, format: Format, seed: S) -> Result<T, Failure>
where
    S: for<'de> DeserializeSeed<'de, Value = T> + Copy,
{
    match format {
        Format::Yaml => {
            let read = |text: &str| seed.deserialize(serde_norway::Deserializer::from_str(text));
            read(chunk.text).map_err(|error| {
                // Read again with as many empty lines before it as the file has lines: some
                // messages speak of several lines.
                let padded = "\n".repeat(chunk.lines_before) + chunk.text;
                Failure::from_yaml(&read(&padded).err().unwrap_or(error))
            })
        }
        Format::Json => {
            let mut from = serde_json::Deserializer::from_str(chunk.text);
            seed.deserialize(&mut from)
                .map_err(|error| Failure::from_json(&error, chunk.lines_before))
        }
    }
}

/// Why a document, or a part of it, cannot be read.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// Line in the file; without one it is the whole document.
    line: Option<usize>,
    cause: String,
}

impl Failure {
    fn whole(cause: String) -> Self {
        Self { line: None, cause }
    }

    fn too_deep(chunk: Chunk<'_>, line: usize) -> Self {
        let cause = format!(
            "nested deeper than {} levels; correct the brackets or the indentation, or remove the \
             document",
            depth::DEPTH_MAX
        );
        Self {
            line: Some(chunk.lines_before + line + 1),
            cause,
        }
    }

    fn invalid(invalid: &InvalidObject, chunk: Chunk<'_>) -> ManifestError {
        Self::whole(invalid.to_string()).at(chunk, Some(invalid.object.clone()))
    }

    fn from_yaml(error: &serde_norway::Error) -> Self {
        let Some(location) = error.location() else {
            return Self::whole(error.to_string());
        };
        Self::with_line(error, location.line(), location.column(), 0)
    }

    pub(super) fn from_json(error: &serde_json::Error, lines_before: usize) -> Self {
        Self::with_line(error, error.line(), error.column(), lines_before)
    }

    /// Takes the place from the end of the message: it stands at its beginning.
    fn with_line(
        error: &dyn fmt::Display,
        line: usize,
        column: usize,
        lines_before: usize,
    ) -> Self {
        let cause = error.to_string();
        let place = format!(" at line {line} column {column}");
        Self {
            line: Some(lines_before + line),
            cause: cause.strip_suffix(&place).unwrap_or(&cause).to_owned(),
        }
    }

    pub(super) fn at(self, chunk: Chunk<'_>, object: Option<ObjectKey>) -> ManifestError {
        let cause = match &object {
            Some(key) if !self.cause.starts_with(&key.to_string()) => {
                format!("{key}: {}", self.cause)
            }
            _ => self.cause,
        };
        ManifestError {
            line: self.line.unwrap_or_else(|| chunk.line()),
            cause,
            object,
        }
    }
}

impl Chunk<'_> {
    fn line(&self) -> usize {
        self.first_line().unwrap_or(self.lines_before + 1)
    }
}
