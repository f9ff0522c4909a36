//! How messages become bytes: prost's encoding, in buffers of the size that a stream needs.
//!
//! tonic gives each direction of each call a buffer of 8 KiB from its beginning to its end. For one that
//! carries output that is little; the control stream of a node carries a few dozen bytes now and then,
//! and a hub has one for every node that is connected: most of what an idle node costs it would be
//! such buffers.

use std::any::TypeId;
use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

use crate::v1;

/// What a stream of small frames begins with. It grows for a frame that is larger.
const SMALL: usize = 256;
/// Encoded bytes after which the rest of what is ready waits for the next frame, as in tonic.
const TOGETHER: usize = 32 * 1024;

/// See the module. Named by the generated clients and servers.
#[derive(Clone, Debug)]
pub(crate) struct MeshCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for MeshCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for MeshCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(buffers::<T>())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(buffers::<U>())
    }
}

fn buffers<T: 'static>() -> BufferSettings {
    let message = TypeId::of::<T>();
    let control = [TypeId::of::<v1::NodeFrame>(), TypeId::of::<v1::HubFrame>()];
    if control.contains(&message) {
        BufferSettings::new(SMALL, TOGETHER)
    } else {
        BufferSettings::default()
    }
}
